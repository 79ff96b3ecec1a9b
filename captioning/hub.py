"""Trained models on the Hugging Face Hub: fetched by name, shared with a model card.

    Captioner.load("user/name")
    Captioner.load("models/scenes").push_to_hub("user/name", licence="mit")

A repository holds a model's folder with its best epoch only, the weights also as .safetensors files, and a model card,
README.md. Repositories are not trusted: `checkpoint` reads a download like any other folder and executes no code in it.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save

from captioning.checkpoint import (
    DESCRIPTION,
    Description,
    choose_epoch,
    name_weights,
    read_description,
    weight_file,
    weight_files,
    write_description,
)
from captioning.errors import InputError, describe_network_error
from captioning.files import write_file
from captioning.weights import read_state_dict
from model import DECODERS

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

# huggingface_hub takes a second to import and most runs do not need it, so the functions that use it import it.

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
MAX_MODEL = 8 << 30  # size limit of a download, in bytes
PARTS = ("encoder-*", "decoder-*", "backbone")  # names of a model's weight files, without their suffixes
SAFE, PICKLED = ([DESCRIPTION, *(part + suffix for part in PARTS)] for suffix in (".safetensors", ".pkl"))
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
CARD_METRICS = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "val_perplexity")


def find_model(model: str | Path) -> Path:
    """Return a model's folder: `model` itself or, for a user/name on the Hub, the folder of its download.

    An existing folder takes precedence, and the Hub is not queried if the parent folder exists. Raises `InputError` if
    the Hub has no such model or cannot be reached.
    """
    folder, name = Path(os.path.expanduser(model)), Path(model).as_posix()
    if os.path.exists(folder) or os.path.exists(folder.parent) or not HUB_NAME.fullmatch(name):
        return folder
    return download_model(name)


def download_model(name: str) -> Path:
    """Download user/name from the Hub, or the changes since the last download, and return its folder.

    Without a network, the last download is returned. Raises `InputError` if there is none, and for a repository that
    does not exist, is not a model of this project or is too large.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.utils import filter_repo_objects

    with _explained(f"{name} is not an existing folder and cannot be downloaded from the Hub"):
        try:
            files = HfApi().model_info(name, files_metadata=True, timeout=20).siblings or []
        except RepositoryNotFoundError:
            raise
        except Exception as error:  # of the HTTP client, whose package changes from version to version
            try:
                return Path(snapshot_download(name, allow_patterns=SAFE, local_files_only=True))
            except LocalEntryNotFoundError:
                raise error from error.__cause__  # not from the missing download, which says less
        sizes = {file.rfilename: file.size or 0 for file in files}
        if DESCRIPTION not in sizes:
            raise InputError(f"{name} on the Hub is not a model of this project: it has no {DESCRIPTION}.")
        patterns = SAFE if list(filter_repo_objects(sizes, allow_patterns=SAFE[1:])) else PICKLED
        size = sum(sizes[file] for file in filter_repo_objects(sizes, allow_patterns=patterns))
        if size > MAX_MODEL:
            raise InputError(
                f"{name} on the Hub has {size / 1e9:,.0f} GB, and a model may have {MAX_MODEL / 1e9:,.0f} GB at most; "
                f"it is not downloaded."
            )
        return Path(snapshot_download(name, allow_patterns=patterns))


def write_shared(model: Path, folder: Path, name: str, licence: str, epoch: int | None = None) -> None:
    """Write the files to share of a model, its best epoch or `epoch` and a model card, into an existing folder.

    captioner.json is written without the paths of the folders of the training run, which are private.
    """
    description = read_description(model)
    epoch = choose_epoch(model, description, epoch)
    description.best_epoch = epoch
    description.training = _without_folders(description.training)
    files = weight_files(model, epoch)
    if description.architecture.backbone_weights == "shared":  # else a file backbone.* belongs to another model
        files += (weight_file(model, "backbone"),)
    for path in files:
        state = {key: value.contiguous() for key, value in read_state_dict(path).items()}
        write_file(folder / f"{path.stem}.pkl", partial(torch.save, state))
        content = save(state, metadata={"format": "pt"})
        write_file(folder / f"{path.stem}.safetensors", lambda file, content=content: file.write(content))
    write_description(folder, description)
    card = model_card(description, name, licence)
    write_file(folder / "README.md", lambda file: file.write(card.encode()))


def _without_folders(value: Any) -> Any:
    """Return the value of a setting, also a nested one, with every path shortened to its last part."""
    if isinstance(value, dict):
        return {name: _without_folders(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_folders(each) for each in value]
    return _without_folder(value) if isinstance(value, str) else value


def _without_folder(path: str) -> str:
    """Return the last part of a path, or user/name for the folder of a model of the Hub in its cache."""
    # PureWindowsPath splits at both separators, so that a model that was trained on Windows can be shared from Linux.
    parts = PureWindowsPath(path).parts
    cached = re.fullmatch(r"models--(.+?)--(.+)", parts[-3]) if len(parts) > 2 and parts[-2] == "snapshots" else None
    return "/".join(cached.groups()) if cached else PureWindowsPath(path).name


def push(model: Path, name: str, licence: str, private: bool = False, epoch: int | None = None) -> str:
    """Share a model's folder as user/name on the Hub and return its address; see `Captioner.push_to_hub`."""
    from huggingface_hub import HfApi, get_token

    if not isinstance(name, str) or not HUB_NAME.fullmatch(name):
        raise InputError(f"{name} is not a name on the Hub; give user/name.")
    if get_token() is None:
        raise InputError(f"{name} cannot be shared on the Hub: you are not logged in; {LOGIN}.")
    with tempfile.TemporaryDirectory(prefix="share-") as folder:
        write_shared(model, Path(folder), name, licence, epoch)
        with _explained(f"{name} cannot be shared on the Hub"):
            api = HfApi()
            address = api.create_repo(name, private=private, exist_ok=True)
            if private and api.model_info(name).private is False:  # `create_repo` changes no existing repository
                raise InputError(f"{name} on the Hub is public; make it private there first, or choose another name.")
            message = f"Share {name.split('/')[1]}"
            old = [f"{part}.*" for part in PARTS]  # weights of an epoch shared earlier
            api.upload_folder(repo_id=name, folder_path=folder, delete_patterns=old, commit_message=message)
    return str(address)


CARD = """\
---
{metadata}
---

# {name}

An image captioning model.

| | |
| --- | --- |
| input | {size} x {size} pixels |
| backbone | `{architecture.backbone}`; backbone weights not stored here are downloaded on load |
| decoder | `{architecture.decoder}`: {decoder} |
| sizes | embedding {architecture.embed_size}, hidden {architecture.hidden_size}, layers {architecture.num_layers} |
| vocabulary | {words:,} words |

## How to use it

With the code of the image-captioning project that trained it:

```sh
python caption.py photo.jpg --model {name}
```

```python
from caption import Captioner

captioner = Captioner.load("{name}")
print(captioner("photo.jpg")[0].text)
```

`captioner.json` holds the architecture, the preprocessing, the vocabulary and the training settings.
The weights ({weights}) are stored as `.safetensors` and, with the same values, as the `.pkl` state dicts of the
original recipe.

## Data

{data}

## Metrics

{metrics}

## Limits

It knows only the objects and words of its training captions, and reproduces their errors and biases. A wrong caption
can have as high a probability as a right one.

## Licence

{licence}
"""


def model_card(description: Description, name: str, licence: str) -> str:
    """Build the README.md of a shared model: the Hub's metadata, then Markdown."""
    from huggingface_hub import ModelCardData

    architecture, epoch = description.architecture, description.best_epoch
    measured = next((entry for entry in description.epochs if entry.get("epoch") == epoch), {})
    scores = {key: measured[key] for key in CARD_METRICS if isinstance(measured.get(key), (int, float))}
    if "averaged_epochs" in description.training:
        scores = {}  # only single epochs were scored
    data_set = str(description.data.get("folder", "unknown"))
    metadata = ModelCardData(
        license=licence,
        pipeline_tag="image-to-text",
        tags=["image-captioning"],
        model_name=name.split("/")[1],
        eval_results=[_eval_result(data_set, metric, value) for metric, value in scores.items()] or None,
    )
    metrics = "No metrics were recorded."
    if scores:
        table = _table(["metric", ""], {metric: f"{value:.3f}" for metric, value in scores.items()})
        metrics = f"On the validation split after epoch {epoch}, greedy decoding, plain tokenizer:\n\n{table}"
    return CARD.format(
        metadata=metadata.to_yaml(),
        name=name,
        size=description.preprocessing.image_size,
        architecture=architecture,
        decoder=str(DECODERS[architecture.decoder].__doc__).splitlines()[0],
        words=len(description.vocabulary),
        weights=name_weights(description, epoch),
        data=_about_data(description.data, description.training.get("start_from")),
        metrics=metrics,
        licence=licence,
    )


def _about_data(data: dict[str, Any], start_from: object) -> str:
    """Build a table of the training data, and of the model that training started from, if any, as Markdown."""
    if not data:
        return "Its training data is not recorded."
    labels = {
        "train_photos": "training images",
        "train_captions": "training captions",
        "val_photos": "validation images",
    }
    rows = {"data set": str(data.get("folder", "unknown"))}
    rows |= {label: f"{data[key]:,}" for key, label in labels.items() if isinstance(data.get(key), int)}
    if start_from:
        name = str(start_from)
        rows["trained from the model"] = name if HUB_NAME.fullmatch(name) else _without_folder(name)
    rows["SHA-256 of the training captions"] = f"`{data.get('train_sha256', 'unknown')}`"
    return _table(["", ""], rows)


def _table(head: list[str], rows: dict[str, str]) -> str:
    """Build a Markdown table of two columns."""
    escaped = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows.items()]
    lines = [head, ["---", "---"], *escaped]
    return "\n".join("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines)


def _eval_result(data: str, metric: str, value: float) -> EvalResult:
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="image-to-text",
        dataset_type=data,
        dataset_name=data,
        dataset_split="validation",
        metric_type=metric.lower(),
        metric_name=metric,
        metric_value=value,
    )


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Convert the errors of huggingface_hub and its HTTP client into `InputError`."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        yield
    except InputError:
        raise
    except GatedRepoError:
        raise InputError(f"{what}: its owner gives access on request; ask on its page, and {LOGIN}.") from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{what}: there is no such repository; check the name, or, if it is private, {LOGIN}."
        ) from None
    except LocalTokenNotFoundError:
        raise InputError(f"{what}: you are not logged in; {LOGIN}.") from None
    except OfflineModeIsEnabled:
        raise InputError(f"{what}: HF_HUB_OFFLINE is set; unset it.") from None
    except HFValidationError as error:
        raise InputError(f"{what}: {error} Choose another name.") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise InputError(f"{what}: you are not logged in; {LOGIN}.") from None
        if status == 403:
            raise InputError(f"{what}: you may not write there; check the name and your token's rights.") from None
        raise InputError(
            f"{what}: the Hub answers {status} ({describe_network_error(error)}); try again later."
        ) from None
    except Exception as error:  # the HTTP client's errors, which share no base class from version to version
        if isinstance(error, OSError) and error.filename is not None:
            raise InputError(
                f"{what}: {error.filename} cannot be written ({error.strerror}); set HF_HOME to a writable folder."
            ) from None
        if isinstance(error, ValueError) and "metadata" in str(error):
            reason = " ".join(str(error).split())
            raise InputError(f"{what}: {reason}; name the licence as the Hub does, such as mit or cc-by-4.0.") from None
        raise InputError(f"{what}: {describe_network_error(error)}; check the network and try again.") from None
