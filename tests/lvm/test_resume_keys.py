"""Every key of a run's record is free on resume or refused, for both kinds of training."""

import copy
import dataclasses
import pathlib

import pytest
from flax import traverse_util

from lvm import train as lvm_train
from lvm.common import files
from lvm.common.config import from_config_dict, to_json
from lvm.common.errors import UserError
from lvm.data.mixture.mixture import ComponentConfig, MixtureConfig
from lvm.data.mixture.recipes import Single
from lvm.data.store.reader import MANIFEST
from lvm.training.config import TrainConfig
from lvm.training.workdir import CONFIG, Workdir
from tests.configs import tiny_tokenizer
from tokenizer import train as tokenizer_train
from tokenizer.config import TokenizerConfig
from tokenizer.images import ImagesConfig

# Both kinds of training.
FREE = """
config.mesh.data config.mesh.fsdp config.mesh.sequence config.mesh.tensor config.mesh.zero1
config.distributed.initialization_timeout config.distributed.heartbeat_timeout config.loop.total_steps
config.loop.total_tokens config.loop.log_every config.loop.evaluate_every config.loop.picture_every
config.loop.checkpoint_every config.loop.keep config.loop.keep_every config.loop.keep_steps
config.loop.max_skipped
config.loop.input_workers config.loop.profile config.loop.compilation_cache config.loop.wandb
config.loop.spike.deviations config.loop.spike.window config.loop.spike.skip_before config.loop.spike.max_rewinds
config.loop.watchdog.factor config.loop.watchdog.min_timeout_s config.loop.watchdog.startup_timeout_s
config.loop.watchdog.pause_timeout_s config.loop.local_checkpoint.folder config.loop.local_checkpoint.every
config.loop.local_checkpoint.keep
"""
REFUSED = """
config.seed config.batch_size config.init_from config.optimizer.name config.optimizer.schedule
config.optimizer.learning_rate config.optimizer.end_learning_rate config.optimizer.warmup_steps
config.optimizer.warmup_tokens config.optimizer.decay_steps config.optimizer.decay_tokens config.optimizer.b1
config.optimizer.b2 config.optimizer.epsilon config.optimizer.weight_decay config.optimizer.weight_decay_mask
config.optimizer.moment_dtype config.optimizer.clip_norm
"""
# The transformer's. A changed mixture is refused unless `config.accept_changed_mixture`.
LVM_FREE = """
folder config.branch_from config.evaluation_source
config.tokenizer config.accept_changed_mixture config.compiler_options config.deterministic
config.model.attention config.model.remat config.data.components.photos.store
config.data.components.photos.max_repetitions config.data.store config.data.allow_missing config.data.stage_to
config.data.skip_damaged config.objective.logits_chunk config.objective.accumulate_steps
config.objective.rows_per_device
compiler_options.xla_cpu_enable_fast_math tokenizer.weights
"""
LVM_REFUSED = """
config.heldout_batches config.model.hidden_size config.model.mlp_size config.model.num_layers config.model.num_heads
config.model.num_kv_heads config.model.vocabulary_size config.model.context config.model.rope_theta
config.model.norm_epsilon config.model.init_std config.model.depth_scaled_init config.model.tie_embeddings
config.model.parametrization.name config.model.parametrization.base_width
config.model.parametrization.base_depth config.model.parametrization.base_head_dim
config.model.dtype config.objective.z_loss tokenizer.grid tokenizer.hash tokenizer.num_codes
"""
LVM_MIXTURE = """
config.data.components.photos.recipe.kind config.data.components.photos.recipe.stream
config.data.components.photos.weight config.data.heldout_fraction config.data.weigh_by config.data.packing
config.data.loss config.data.shuffle config.data.jsonl.num_codes config.data.jsonl.grid stores sources mixture.order
mixture.seed mixture.heldout_fraction mixture.packing mixture.loss mixture.shuffle
mixture.components.photos.recipe.kind mixture.components.photos.recipe.stream mixture.components.photos.share
mixture.components.photos.sentences mixture.components.photos.store mixture.identity
"""
# The tokenizer's.
TOKENIZER_FREE = """
config.data.source config.data.cache_gigabytes config.data.cache_folder
config.data.decoding.decode_timeout_s config.data.decoding.decode_memory_gb
"""
TOKENIZER_REFUSED = """
config.model.resolution config.model.patch_size config.model.channels config.model.channel_multipliers
config.model.encoder_blocks config.model.decoder_blocks config.model.middle_blocks config.model.codebook_size
config.model.codebook_dim config.model.norm_groups config.model.block_bias config.model.shortcut
config.model.downsample config.model.upsample config.model.latent_kernel config.model.quant_convs
config.model.compute_dtype config.preprocess.resolution config.preprocess.mode
config.preprocess.filter config.preprocess.decode config.preprocess.resizer config.preprocess.icc
config.data.heldout_fraction
config.data.rgb_share config.data.max_scenes config.data.crop.scale config.data.crop.aspect
config.data.crop.flip config.data.crop.min_side config.data.mixed_files
config.loss.l1 config.loss.l2 config.loss.gradient
config.loss.autoencoder_steps config.model.quantizer.kind config.model.quantizer.commitment
config.model.quantizer.codebook config.model.quantizer.entropy config.model.quantizer.temperature
config.model.quantizer.gradient config.model.quantizer.learning config.model.quantizer.ema_decay
config.model.quantizer.dead_below config.train config.ema_decay config.loss.perceptual.kind config.adversarial.weight
config.adversarial.adaptive config.adversarial.start_step config.adversarial.objective
config.adversarial.feature_matching config.adversarial.lecam config.adversarial.lecam_decay config.adversarial.r1
config.adversarial.discriminator.kind config.adversarial.discriminator.channels
config.adversarial.discriminator.stages config.adversarial.discriminator.norm_groups
config.adversarial.optimizer.name config.adversarial.optimizer.schedule config.adversarial.optimizer.learning_rate
config.adversarial.optimizer.end_learning_rate config.adversarial.optimizer.warmup_steps
config.adversarial.optimizer.warmup_tokens config.adversarial.optimizer.decay_steps
config.adversarial.optimizer.decay_tokens config.adversarial.optimizer.b1 config.adversarial.optimizer.b2
config.adversarial.optimizer.epsilon config.adversarial.optimizer.weight_decay
config.adversarial.optimizer.weight_decay_mask config.adversarial.optimizer.moment_dtype
config.adversarial.optimizer.clip_norm
preprocess.resolution preprocess.mode preprocess.filter preprocess.icc preprocess.colours source.kind
source.num_scenes source.seed
source.num_frames source.streams
"""

# Defaults: a changed one changes new runs, and refuses to resume those that left it to us.
DEFAULTS = """
seed=0 init_from='' data.heldout_fraction=0.05 optimizer.name='adamw' optimizer.schedule='cosine'
optimizer.learning_rate=0.00015 optimizer.end_learning_rate=3e-05 optimizer.warmup_steps=2000
optimizer.warmup_tokens=0 optimizer.decay_steps=0 optimizer.decay_tokens=0 optimizer.b1=0.9 optimizer.b2=0.95
optimizer.epsilon=1e-08 optimizer.weight_decay=0.1 optimizer.weight_decay_mask='matrices'
optimizer.moment_dtype='float32' optimizer.clip_norm=1.0 mesh.data=-1 mesh.fsdp=1 mesh.sequence=1 mesh.tensor=1
mesh.zero1=False distributed.initialization_timeout=3600 distributed.heartbeat_timeout=100 loop.total_steps=100000
loop.total_tokens=0 loop.log_every=50 loop.evaluate_every=1000 loop.picture_every=5000 loop.checkpoint_every=1000
loop.keep=2 loop.keep_every=0 loop.keep_steps=()
loop.max_skipped=10 loop.input_workers=0 loop.profile=() loop.compilation_cache=''
loop.wandb='' loop.spike.deviations=0.0 loop.spike.window=128 loop.spike.skip_before=100 loop.spike.max_rewinds=10
loop.watchdog.factor=10.0 loop.watchdog.min_timeout_s=300.0 loop.watchdog.startup_timeout_s=3600.0
loop.watchdog.pause_timeout_s=3600.0 loop.local_checkpoint.folder='' loop.local_checkpoint.every=50
loop.local_checkpoint.keep=2
"""
LVM_DEFAULTS = """
branch_from=''
batch_size=128 heldout_batches=4 tokenizer='' accept_changed_mixture=False compiler_options='' deterministic=False
model.hidden_size=1024 model.mlp_size=2688 model.num_layers=22 model.num_heads=8 model.num_kv_heads=0
model.vocabulary_size=0 model.context=4096 model.rope_theta=10000.0 model.norm_epsilon=1e-06 model.init_std=0.02
model.depth_scaled_init=False model.tie_embeddings=False model.dtype='bfloat16' model.attention='auto'
model.remat='none' model.parametrization.name='standard' model.parametrization.base_width=0
model.parametrization.base_depth=0 model.parametrization.base_head_dim=0 data.store=() data.allow_missing=False
data.weigh_by='sentences' data.packing='concat'
data.loss='all' data.shuffle='all' data.jsonl.num_codes=8192 data.jsonl.grid=(16,16) data.stage_to=''
data.skip_damaged=False objective.z_loss=0.0 objective.logits_chunk=1024 objective.accumulate_steps=1
objective.rows_per_device=0 evaluation_source=''
"""
TOKENIZER_DEFAULTS = """
batch_size=256 model.resolution=256 model.patch_size=1 model.channels=128 model.channel_multipliers=(1,2,2,4,6)
model.encoder_blocks=2 model.decoder_blocks=3 model.middle_blocks=2 model.codebook_size=8192 model.codebook_dim=64
model.norm_groups=32 model.block_bias=True model.shortcut='input' model.downsample='strided_conv'
model.upsample='nearest_conv' model.latent_kernel=3 model.quant_convs=True
model.compute_dtype='float32' preprocess.resolution=256 preprocess.mode='squash' preprocess.filter='bicubic'
preprocess.decode='full' preprocess.resizer='pillow' preprocess.icc='srgb' data.source='' data.rgb_share=1.0
data.max_scenes=0 data.crop.scale=(0.8,1.0) data.crop.aspect=(0.75,1.3333333333333333) data.crop.flip=True
data.crop.min_side=0 data.mixed_files=64 data.cache_gigabytes=0.0 data.cache_folder=''
data.decoding.decode_timeout_s=60.0 data.decoding.decode_memory_gb=4.0 loss.l1=1.0 loss.l2=4.0 loss.gradient=0.5
loss.autoencoder_steps=10000 model.quantizer.kind='vq' model.quantizer.commitment=0.25 model.quantizer.codebook=1.0
model.quantizer.entropy=0.0 model.quantizer.temperature=0.01 model.quantizer.gradient='straight_through'
model.quantizer.learning='ema' model.quantizer.ema_decay=0.97 model.quantizer.dead_below=0.1
train='all' ema_decay=0.0 loss.perceptual.kind='none' adversarial.weight=0.0 adversarial.adaptive=False
adversarial.start_step=20000 adversarial.objective='hinge' adversarial.feature_matching=0.0 adversarial.lecam=0.0
adversarial.lecam_decay=0.999 adversarial.r1=0.0 adversarial.discriminator.kind='blur_pool'
adversarial.discriminator.channels=128 adversarial.discriminator.stages=3 adversarial.discriminator.norm_groups=32
adversarial.optimizer.name='adamw' adversarial.optimizer.schedule='cosine' adversarial.optimizer.learning_rate=0.00015
adversarial.optimizer.end_learning_rate=3e-05 adversarial.optimizer.warmup_steps=2000
adversarial.optimizer.warmup_tokens=0 adversarial.optimizer.decay_steps=0 adversarial.optimizer.decay_tokens=0
adversarial.optimizer.b1=0.9 adversarial.optimizer.b2=0.95 adversarial.optimizer.epsilon=1e-08
adversarial.optimizer.weight_decay=0.1 adversarial.optimizer.weight_decay_mask='matrices'
adversarial.optimizer.moment_dtype='float32' adversarial.optimizer.clip_norm=1.0
"""


class OpenedError(Exception):
    """Carries the arguments that a command opens its workdir with."""


def opened_with(monkeypatch, command, config, path):
    """Runs a training command up to its workdir; returns the workdir's arguments after the path."""

    def stop(*arguments, **options):
        raise OpenedError(arguments[1:], options)

    monkeypatch.setattr(command, "Workdir", stop)
    with pytest.raises(OpenedError) as opened:
        command.train(config, path)
    return opened.value.args


def change(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    return [*value, "new"] if isinstance(value, list) else value + (1 if isinstance(value, int | float) else "new")


def outcomes(folder, arguments, options):
    """By key of a record, "free" or "refused" if it alone differs on resume."""
    kind, record, *rest = arguments
    Workdir(folder, kind, record, *rest, **options)
    (folder / "checkpoints" / "10").mkdir(parents=True)
    written = (folder / CONFIG).read_bytes()
    results = {}
    for key, value in traverse_util.flatten_dict(files.as_json(record)).items():
        changed = copy.deepcopy(files.as_json(record))
        *parents, last = key
        group = changed
        for parent in parents:
            group = group[parent]
        group[last] = change(value)
        (folder / ".lock").unlink()
        try:
            Workdir(folder, kind, changed, *rest, **options)
            results[".".join(key)] = "free"
        except UserError as error:
            results[".".join(key)] = "refused" if ".".join(key) in str(error) else str(error)
        (folder / CONFIG).write_bytes(written)
    return results


def expected(free, refused):
    return dict.fromkeys(free.split(), "free") | dict.fromkeys(refused.split(), "refused")


@pytest.mark.parametrize("accepted", [False, True])
def test_lvm_resume_keys(make_store, tmp_path, monkeypatch, accepted):
    path = make_store([(1, 0)] * 9)
    manifest = pathlib.Path(path, MANIFEST)
    files.write_json(manifest, files.read_json(manifest) | {"source": {"kind": "folder"}})
    data = MixtureConfig({"photos": ComponentConfig(Single())}, (path,))
    config = TrainConfig(data=data, accept_changed_mixture=accepted, compiler_options="xla_cpu_enable_fast_math=true")
    call = opened_with(monkeypatch, lvm_train, config, str(tmp_path / "run"))
    free, refused = FREE + LVM_FREE, REFUSED + LVM_REFUSED
    table = {True: expected(free + LVM_MIXTURE, refused), False: expected(free, refused + LVM_MIXTURE)}
    assert outcomes(tmp_path / "run", *call) == table[accepted]


@pytest.mark.parametrize(
    ("before", "after", "resumes"),
    [
        ({"hash": "a"}, {"hash": "a", "codes": "c"}, True),  # the record of an earlier version
        ({"hash": "a", "codes": "c"}, {"hash": "b", "codes": "c"}, True),  # a tuned decoder
        ({"hash": ""}, {"hash": "b", "codes": "c"}, True),  # unknown
        ({"hash": "a", "codes": "c"}, {"hash": "b", "codes": "d"}, False),
        ({"hash": "a"}, {"hash": "b", "codes": "c"}, False),
    ],
)
def test_run_resumes_on_equal_codes(tmp_path, before, after, resumes):
    config = to_json(TrainConfig())
    Workdir(tmp_path, "lvm", {"config": config, "tokenizer": before | {"weights": "w", "num_codes": 16}})._lock.close()
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    record = {"config": config, "tokenizer": after | {"weights": "x", "num_codes": 16}}
    if resumes:
        Workdir(tmp_path, "lvm", record)
    else:
        with pytest.raises(UserError, match=r"another configuration \(tokenizer\."):
            Workdir(tmp_path, "lvm", record)


def test_tokenizer_resume_keys(tmp_path, monkeypatch):
    config = from_config_dict(TokenizerConfig, tiny_tokenizer.get_config())
    config = dataclasses.replace(config, data=ImagesConfig(config.data.source, heldout_fraction=0.25))
    call = opened_with(monkeypatch, tokenizer_train, config, str(tmp_path / "run"))
    table = expected(FREE + TOKENIZER_FREE, REFUSED + TOKENIZER_REFUSED)
    assert outcomes(tmp_path / "run", *call) == table


@pytest.mark.parametrize(("config", "own"), [(TrainConfig, LVM_DEFAULTS), (TokenizerConfig, TOKENIZER_DEFAULTS)])
def test_config_defaults(config, own):
    defaults = traverse_util.flatten_dict(to_json(config()), sep=".")
    table = dict(entry.split("=", 1) for entry in (DEFAULTS + own).split())
    assert {key: repr(value).replace(" ", "") for key, value in defaults.items()} == table
