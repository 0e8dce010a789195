"""The published tokenizers in torch: peers of `scripts.benchmark_tokenizer` and of the parity tests.

LVM's released network is diffusers' `VQModel`. The two older ones are written from their description, with the
parameter names of their torch files, so that `load_state_dict` takes what `tokenizer convert --to=torch` writes. Images
and latents are NCHW.
"""

import gc
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate, silu

from scripts.benchmark_tokenizer import Job, measure, random_codes, random_images
from scripts.contenders import Report, one_line
from tokenizer.network import VARIANTS, VQGANConfig


class Block(nn.Module):
    """Residual block: norm → swish → 3×3, twice; `shortcut` names the 1×1 that is used where channels change."""

    def __init__(self, inputs: int, outputs: int, groups: int, shortcut: str, of_output: bool):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=1e-6)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut, self.of_output = shortcut if inputs != outputs else "", of_output
        if self.shortcut:
            self.add_module(shortcut, nn.Conv2d(outputs if of_output else inputs, outputs, 1, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(silu(self.norm2(h)))
        if self.shortcut:
            x = getattr(self, self.shortcut)(h if self.of_output else x)
        return h + x


class MaskGIT(nn.Module):
    """MaskGIT's tokenizer: average pooling down, nearest and a 3×3 up, shortcuts from a block's own output."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths, groups = config.widths, config.norm_groups
        self.encoder, self.decoder, self.quantize = nn.Module(), nn.Module(), nn.Module()
        self.quantize.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)

        def stage(inputs: int, outputs: int, count: int) -> nn.ModuleList:
            blocks = [Block(outputs if j else inputs, outputs, groups, "nin_shortcut", True) for j in range(count)]
            return nn.ModuleList(blocks)

        encoder, decoder, last = self.encoder, self.decoder, len(widths) - 1
        encoder.conv_in = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        encoder.down = nn.ModuleList([nn.Module() for _ in widths])
        decoder.up = nn.ModuleList([nn.Module() for _ in widths])
        for i, width in enumerate(widths):
            encoder.down[i].block = stage(widths[max(i - 1, 0)], width, config.encoder_blocks)
            decoder.up[i].block = stage(widths[min(i + 1, last)], width, config.decoder_blocks)
            if i:
                decoder.up[i].upsample_conv = nn.Conv2d(width, width, 3, padding=1)
        for half in (encoder, decoder):
            half.mid = stage(widths[-1], widths[-1], config.middle_blocks)
        encoder.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        encoder.conv_out = nn.Conv2d(widths[-1], config.codebook_dim, 1)
        decoder.conv_in = nn.Conv2d(config.codebook_dim, widths[-1], 3, padding=1)
        decoder.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        decoder.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def latents(self, images: torch.Tensor) -> torch.Tensor:
        x = self.encoder.conv_in(images)
        for i, stage in enumerate(self.encoder.down):
            x = _through(stage.block, avg_pool2d(x, 2) if i else x)
        x = _through(self.encoder.mid, x)
        return self.encoder.conv_out(silu(self.encoder.norm_out(x)))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        x = _through(self.decoder.mid, self.decoder.conv_in(_grid(self.quantize.embedding(codes))))
        for stage in reversed(self.decoder.up):
            x = _through(stage.block, x)
            if hasattr(stage, "upsample_conv"):
                x = stage.upsample_conv(interpolate(x, scale_factor=2, mode="nearest"))
        return self.decoder.conv_out(silu(self.decoder.norm_out(x)))

    def codes(self, latents: torch.Tensor) -> torch.Tensor:
        return _nearest(latents, self.quantize.embedding.weight)


class OldLVM(nn.Module):
    """LVM's first tokenizer: MaskGIT's with shortcuts from a block's input, and depth-to-space upsampling."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths, groups, self.config = config.widths, config.norm_groups, config
        self.encoder, self.decoder, self.quantizer = nn.Module(), nn.Module(), nn.Module()
        self.quantizer.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)

        def blocks(outputs: list[int]) -> nn.ModuleList:
            pairs = zip([outputs[0], *outputs], outputs, strict=False)
            return nn.ModuleList([Block(a, b, groups, "conv_out", False) for a, b in pairs])

        middle = [widths[-1]] * config.middle_blocks
        down = [width for width in widths for _ in range(config.encoder_blocks)]
        up = [width for width in reversed(widths) for _ in range(config.decoder_blocks)]
        encoder, decoder = self.encoder, self.decoder
        encoder.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        encoder.blocks = blocks(down + middle)
        encoder.norm1 = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        encoder.conv2 = nn.Conv2d(widths[-1], config.codebook_dim, 1)
        decoder.conv1 = nn.Conv2d(config.codebook_dim, widths[-1], 3, padding=1)
        decoder.blocks = blocks(middle + up)
        decoder.up_convs = nn.ModuleList([nn.Conv2d(w, 4 * w, 3, padding=1) for w in reversed(widths[1:])])
        decoder.norm1 = nn.GroupNorm(groups, widths[0], eps=1e-6)
        decoder.conv6 = nn.Conv2d(widths[0], 3, 3, padding=1)

    def latents(self, images: torch.Tensor) -> torch.Tensor:
        x, per_stage = self.encoder.conv1(images), self.config.encoder_blocks
        for number, block in enumerate(self.encoder.blocks):
            begins = number % per_stage == 0 and 0 < number < per_stage * len(self.config.widths)
            x = block(avg_pool2d(x, 2) if begins else x)
        return self.encoder.conv2(silu(self.encoder.norm1(x)))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        x, up_convs = self.decoder.conv1(_grid(self.quantizer.embedding(codes))), iter(self.decoder.up_convs)
        for number, block in enumerate(self.decoder.blocks, 1 - self.config.middle_blocks):
            x = block(x)
            if number > 0 and number % self.config.decoder_blocks == 0:
                up_conv = next(up_convs, None)
                x = _depth_to_space(up_conv(x)) if up_conv else x
        return self.decoder.conv6(silu(self.decoder.norm1(x)))

    def codes(self, latents: torch.Tensor) -> torch.Tensor:
        return _nearest(latents, self.quantizer.embedding.weight)


class ReleasedLVM(nn.Module):
    """diffusers' `VQModel` with the interface of the other two."""

    def __init__(self, model: diffusers.VQModel):
        super().__init__()
        self.model = model

    def latents(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.encode(images).latents

    def codes(self, latents: torch.Tensor) -> torch.Tensor:
        return _nearest(latents, self.model.quantize.embedding.weight)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        side = int(codes.shape[1] ** 0.5)
        shape = (len(codes), side, side, self.model.config.latent_channels)
        return self.model.decode(codes, force_not_quantize=True, shape=shape).sample


def released(config: VQGANConfig) -> ReleasedLVM:
    """LVM's released network at the config's size, with diffusers' random initialization."""
    stages = len(config.widths)
    model = diffusers.VQModel(
        block_out_channels=config.widths,
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        layers_per_block=config.encoder_blocks,
        latent_channels=config.codebook_dim,
        sample_size=config.resolution,
        num_vq_embeddings=config.codebook_size,
        norm_num_groups=config.norm_groups,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    )
    return ReleasedLVM(model.eval())


NETWORKS: dict[str, Callable[[VQGANConfig], Any]] = {"maskgit": MaskGIT, "lvm_old": OldLVM, "lvm": released}


def _through(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = block(x)
    return x


def _grid(rows: torch.Tensor) -> torch.Tensor:
    """[B, N, C] of square grids → [B, C, h, w]."""
    side = int(rows.shape[1] ** 0.5)
    return rows.transpose(1, 2).reshape(len(rows), -1, side, side)


def _depth_to_space(x: torch.Tensor) -> torch.Tensor:
    """[B, (h2 w2 c), H, W] → [B, c, 2H, 2W]."""
    B, depth, H, W = x.shape
    x = x.reshape(B, 2, 2, depth // 4, H, W)
    return x.permute(0, 3, 4, 1, 5, 2).reshape(B, depth // 4, 2 * H, 2 * W)


def _nearest(latents: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w] → [B, h·w], in float32 as ours."""
    rows = latents.float().flatten(2).transpose(1, 2)  # [B, N, C]
    codes = codebook.float()
    return (rows @ codes.T - 0.5 * codes.square().sum(-1)).argmax(-1)


def run(job: Job, report: Report) -> None:
    """Reports encoding and decoding, eager and compiled.

    Args:
      job: of `scripts.benchmark_tokenizer`.
      report: receives each row.
    """
    warnings.filterwarnings("ignore")
    if job["platform"] not in ("cpu", "gpu") or (job["platform"] == "gpu" and not torch.cuda.is_available()):
        report({"failed": f"not run: this torch has no {job['platform']}"})
        return
    device = "cuda" if job["platform"] == "gpu" else "cpu"
    report({"libraries": f"torch {torch.__version__}, diffusers {diffusers.__version__}"})
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    if job["dtype"] == "float32":
        torch.set_float32_matmul_precision("highest")  # as in ours
        torch.backends.cudnn.allow_tf32 = False
    network = NETWORKS[job["network"]](VARIANTS[job["network"]]).eval()
    network = network.to(device, getattr(torch, job["dtype"]), memory_format=torch.channels_last)
    for compiled in (False, True) if job["compile"] else (False,):
        for work in ("encode", "decode"):
            variant = f"channels last, {'compiled' if compiled else 'eager'}"
            try:
                report(measure(variant, work, job, _call(network, work, job, device, compiled)))
            except Exception as error:  # the next one may succeed
                print(f"{variant}: {one_line(str(error))}")
                report({"variant": variant, "work": work, "failed": one_line(str(error))})
            torch.compiler.reset()
            gc.collect()


def _call(network: Any, work: str, job: Job, device: str, compiled: bool) -> Callable[[], None]:
    dtype = getattr(torch, job["dtype"])
    images = torch.from_numpy(random_images(job)).permute(0, 3, 1, 2).to(device)
    codes = torch.from_numpy(random_codes(job)).long().to(device)

    def encode(images: torch.Tensor) -> torch.Tensor:
        pixels = (images.to(dtype) / 255).contiguous(memory_format=torch.channels_last)
        return network.codes(network.latents(pixels))

    function = encode if work == "encode" else network.decode
    function = torch.compile(function, dynamic=False) if compiled else function

    def call() -> None:
        with torch.inference_mode():
            function(images if work == "encode" else codes)
        if device == "cuda":
            torch.cuda.synchronize()

    return call
