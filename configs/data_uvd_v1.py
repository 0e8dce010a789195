"""The paper's data (UVDv1: 1.64B images and frames, 420B tokens) as a mixture; you supply the stores.

Every component has its family's share of the paper's tokens and the origin of its images. Encode each data set with
`tokenizer.encode`, and set its store at the command line or here:

    --config.data.components.kinetics.store=STORES/kinetics   (repeat it for a data set in several stores)

Components without a store are reported together; `--config.data.allow_missing=true` skips them, and weights become
relative to the remaining ones. The paper gives shares of families; components of a family are weighted equally. Recipes
name streams; a stream may hold original annotations or those of a model (depth, normals, edges, poses).

Sizes of families are the paper's, and so are the data sets where it lists them; see each set's page for its terms of
use. Parameters, hardware and speed depend on the model; `get_config` has the 3B, not trained here.
"""

import collections
import dataclasses

from ml_collections import ConfigDict

from lvm.common.config import to_config_dict
from lvm.data.mixture.mixture import ComponentConfig, MixtureConfig
from lvm.data.mixture.recipes import (
    Category,
    Interleaved,
    MultiAnnotation,
    Pairs,
    Recipe,
    Rotation,
    Separated,
    Single,
    Video,
)
from lvm.hardware.sharding import MeshConfig
from lvm.model.transformer import SIZES
from lvm.training.config import TrainConfig
from lvm.training.loop import LoopConfig
from lvm.training.optimizer import OptimizerConfig

# family → share of the tokens (arXiv 2312.00785)
SHARES = {
    "images": 0.885,
    "annotated_images": 0.072,
    "videos": 0.042,
    "annotated_videos": 0.0006,
    "renderings": 0.0005,
}

# (family, name, recipe): origin
COMPONENTS: dict[tuple[str, str, Recipe], str] = {
    ("images", "laion", Single()): "LAION-5B, 1.49B filtered images: laion.ai",
    ("annotated_images", "imagenet_category", Category()): "ImageNet-1k by class: image-net.org",
    (
        "annotated_images",
        "imagenet_annotations",
        MultiAnnotation(),
    ): "ImageNet-1k with annotations by models: image-net.org",
    ("annotated_images", "coco_boxes", Pairs(target="boxes")): "COCO boxes: cocodataset.org",
    ("annotated_images", "coco_segmentation", Pairs()): "COCO panoptic: cocodataset.org",
    (
        "annotated_images",
        "coco_pose",
        Pairs(target="pose"),
    ): "COCO and MPII people: cocodataset.org, human-pose.mpi-inf.mpg.de",
    ("annotated_images", "ade20k", Pairs()): "ADE20K: ade20k.csail.mit.edu",
    ("annotated_images", "cityscapes", Pairs()): "Cityscapes: cityscapes-dataset.com",
    ("annotated_images", "nyu_depth", Pairs(target="depth")): "NYU Depth v2: cs.nyu.edu/~silberman",
    ("annotated_images", "normals", Pairs(target="normals")): "normals by a model, of any images",
    ("annotated_images", "edges", Pairs(target="edges")): "edges by a model, of any images",
    (
        "annotated_images",
        "style",
        Pairs(target="style"),
    ): "InstructPix2Pix's generated pairs: timothybrooks.com",
    ("annotated_images", "derain", Pairs("rain", "rgb")): "rainy and clean pairs: Rain13K",
    ("annotated_images", "denoise", Pairs("noise", "rgb")): "SIDD: abdokamel.github.io/sidd",
    ("annotated_images", "low_light", Pairs("dark", "rgb")): "LOL: daooshee.github.io/BMVC2018website",
    ("annotated_images", "stereo", Pairs("left", "right")): "KITTI stereo: cvlibs.net",
    ("annotated_images", "colorization", Pairs("gray", "rgb")): "any images; `gray` is a derived stream",
    ("annotated_images", "inpainting", Pairs("masked", "rgb")): "any images; `masked` is a derived stream",
    ("videos", "kinetics", Video()): "Kinetics-700: deepmind.com/open-source/kinetics",
    ("videos", "something", Video()): "Something-Something v2: developer.qualcomm.com",
    ("videos", "ucf101", Video()): "UCF101: crcv.ucf.edu",
    ("videos", "hmdb51", Video()): "HMDB51: serre-lab.clps.brown.edu",
    ("videos", "charades", Video()): "Charades and Charades-Ego: prior.allenai.org",
    ("videos", "ego4d", Video()): "Ego4D: ego4d-data.org",
    ("videos", "activitynet", Video()): "ActivityNet: activity-net.org",
    ("videos", "moments", Video()): "Multi-Moments in Time: moments.csail.mit.edu",
    ("videos", "other", Video()): "any further unlabelled videos",
    ("annotated_videos", "davis_interleaved", Interleaved()): "DAVIS: davischallenge.org",
    ("annotated_videos", "davis_separated", Separated()): "DAVIS: davischallenge.org",
    ("annotated_videos", "vipseg_interleaved", Interleaved()): "VIPSeg: github.com/VIPSeg-Dataset",
    ("annotated_videos", "vipseg_separated", Separated()): "VIPSeg: github.com/VIPSeg-Dataset",
    ("annotated_videos", "jhmdb_pose", Interleaved(target="pose")): "JHMDB: jhmdb.is.tue.mpg.de",
    ("renderings", "objaverse", Rotation()): "Objaverse, 24 views 15° apart: objaverse.allenai.org",
}


def mixture() -> MixtureConfig:
    """Weights are shares of the codes; rows are cut from one stream of sentences, as in the paper."""
    sizes = collections.Counter(family for family, *_ in COMPONENTS)
    components = {
        name: ComponentConfig(recipe, weight=SHARES[family] / sizes[family]) for family, name, recipe in COMPONENTS
    }
    return MixtureConfig(components, weigh_by="codes", heldout_fraction=0.001)


def training(size: str, remat: str, fsdp: int) -> TrainConfig:
    """The paper's training run of one of `lvm.model.transformer.SIZES`: its 420B tokens once.

    AdamW, its learning rates and warm-up (8000 steps of 524,288 tokens) are the released 7B's. The batch of 512 rows,
    2.1M tokens, is ours: it divides by 128, 256 and 512 chips.
    """
    return TrainConfig(
        batch_size=512,
        model=dataclasses.replace(SIZES[size], remat=remat),
        data=mixture(),
        optimizer=OptimizerConfig(
            learning_rate=1.5e-4, end_learning_rate=3e-5, warmup_steps=0, warmup_tokens=8000 * 524_288
        ),
        mesh=MeshConfig(data=-1, fsdp=fsdp),
        loop=LoopConfig(total_steps=0, total_tokens=420_000_000_000),
    )


def get_config() -> ConfigDict:
    """The 3B, trained on this mixture."""
    return to_config_dict(TrainConfig(model=SIZES["3b"], data=mixture()))
