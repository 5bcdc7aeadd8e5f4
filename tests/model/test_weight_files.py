"""Files of weights: what real programs write comes out, and nothing in a file ever runs."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bifusion_diag.errors import UserError
from bifusion_diag.model.weight_files import file_digest, listed, read_tensors

FORMATS = [pytest.param(True, id="zip"), pytest.param(False, id="legacy")]


class HistoryBuffer:
    """Pickles as MMEngine's does: arrays, and functions of its own class by name."""

    def __init__(self) -> None:
        self._log_history = np.array([1.0, 2.0])
        self._max_length = np.int64(10)
        self._statistics_methods = OrderedDict(min=HistoryBuffer.minimum)

    def minimum(self) -> float:
        return float(self._log_history.min())


class DictConfig:
    """Pickles as omegaconf's does: plain content, and metadata with an empty cache."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.__dict__["_content"] = content
        self.__dict__["_metadata"] = {"resolver_cache": defaultdict(dict), "ref_type": Any, "object_type": dict}


class Executed:
    """Unpickles by calling a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


@pytest.fixture
def weights() -> OrderedDict[str, torch.Tensor]:
    return OrderedDict([("a.weight", torch.randn(3, 4)), ("a.running_mean", torch.randn(3)), ("b", torch.tensor(7))])


@pytest.fixture
def foreign_modules() -> Iterator[None]:
    """The modules that the classes above claim to come from: there while a file is written, gone when it is read."""
    homes = {HistoryBuffer: "mmengine.logging.history_buffer", DictConfig: "omegaconf.dictconfig"}
    for cls, home in homes.items():
        module = types.ModuleType(home)
        setattr(module, cls.__name__, cls)
        cls.__module__ = home
        sys.modules[home] = module
        names = home.split(".")
        for count in range(1, len(names)):
            sys.modules[".".join(names[:count])] = types.ModuleType(names[0])
    yield
    forget_foreign_modules()


def forget_foreign_modules() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("mmengine", "omegaconf")]:
        del sys.modules[name]


def assert_read(path: Path, weights: dict[str, torch.Tensor]) -> None:
    found = read_tensors(path, "model.init_from")
    assert list(found) == list(weights)
    assert all(torch.equal(found[name], value) for name, value in weights.items())


@pytest.mark.parametrize("zipped", FORMATS)
def test_mmengine_and_lightning_checkpoints(
    weights: OrderedDict[str, torch.Tensor], zipped: bool, foreign_modules: None
) -> None:
    mmengine = {
        "meta": {"epoch": 3, "seed": np.int64(4), "dataset_meta": {"palette": np.zeros((2, 3))}, "dir": Path("x")},
        "state_dict": weights,
        "message_hub": {"log_scalars": OrderedDict(loss=HistoryBuffer())},
        "optimizer": torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]).state_dict(),
        "param_schedulers": [{"base_values": [np.float64(0.1)]}],
    }
    lightning = {
        "epoch": 1,
        "state_dict": OrderedDict((f"model.{name}", value) for name, value in weights.items()),
        "hyper_parameters": {"config": DictConfig({"model": {"layers": [1, 2]}})},
    }
    for name, content in (("mm.pth", mmengine), ("pl.ckpt", lightning)):
        torch.save(content, name, _use_new_zipfile_serialization=zipped)
        with pytest.raises(Exception, match="Weights only load failed"):
            torch.load(name, weights_only=True)
    forget_foreign_modules()
    assert_read(Path("mm.pth"), weights)
    assert_read(Path("pl.ckpt"), lightning["state_dict"])
    with pytest.raises(Exception, match="Weights only load failed"):  # nothing stays allowed for later readers
        torch.load("mm.pth", weights_only=True)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "ema_state_dict", None])
def test_where_programs_keep_their_weights(weights: OrderedDict[str, torch.Tensor], key: str | None) -> None:
    torch.save({"epoch": 3, "lr": 0.1, key: weights} if key else weights, "weights.pt")
    assert_read(Path("weights.pt"), weights)


def test_averaged_weights_come_after_those_of_the_state_dict(weights: OrderedDict[str, torch.Tensor]) -> None:
    other = {name: value + 1 for name, value in weights.items()}
    torch.save({"ema_state_dict": other, "state_dict": weights}, "weights.pt")
    assert_read(Path("weights.pt"), weights)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.bin"])
def test_safetensors_are_known_by_their_name_and_by_their_content(
    weights: OrderedDict[str, torch.Tensor], name: str
) -> None:
    save_file(weights, name)
    found = read_tensors(Path(name), "model.init_from")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[each], value) for each, value in weights.items())


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_prefixes_of_wrappers_and_entries_that_are_no_plain_tensor_go(
    weights: OrderedDict[str, torch.Tensor],
) -> None:
    stored: dict[str, Any] = {f"module._orig_mod.{name}": value for name, value in weights.items()}
    torch.save({"state_dict": {**stored, "version": 3, "sparse": torch.eye(3).to_sparse()}}, "weights.pt")
    assert_read(Path("weights.pt"), weights)


@pytest.mark.parametrize("zipped", FORMATS)
@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.system, ("echo > ran",), f"{os.name if os.name == 'nt' else 'posix'}.system"),
        (eval, ("open('ran', 'w').close()",), "builtins.eval"),
        (exec, ("open('ran', 'w').close()",), "builtins.exec"),
        (subprocess.check_call, (["touch", "ran"],), "subprocess.check_call"),
    ],
)
def test_a_file_that_attacks_is_refused_by_name_and_nothing_of_it_runs(
    weights: OrderedDict[str, torch.Tensor],
    zipped: bool,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    named: str,
) -> None:
    content = {"state_dict": weights, "meta": Executed(function, *arguments)}
    torch.save(content, "attack.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=f"attack.pth names {named}: .* Nothing of it was run"):
        read_tensors(Path("attack.pth"), "model.init_from")
    assert not Path("ran").exists()
    torch.load("attack.pth", weights_only=False)
    assert Path("ran").exists()  # the attack works where a file is trusted: this test can fail


@pytest.mark.parametrize("zipped", FORMATS)
def test_functions_that_no_list_names_are_not_run_either(weights: OrderedDict[str, torch.Tensor], zipped: bool) -> None:
    content = {"state_dict": weights, "meta": Executed(np.savetxt, "ran", [1.0])}
    torch.save(content, "sly.pth", _use_new_zipfile_serialization=zipped)
    assert_read(Path("sly.pth"), weights)
    assert not Path("ran").exists()
    torch.load("sly.pth", weights_only=False)
    assert Path("ran").exists()


def test_a_function_fetched_from_an_object_is_not_run(weights: OrderedDict[str, torch.Tensor]) -> None:
    touch = Executed(getattr, Path("ran"), "touch")

    class Called:
        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            return touch, ()  # a call of what a call returns

    Executed.__call__ = lambda self: None  # type: ignore[attr-defined] # else pickle sees that it cannot be called
    try:
        torch.save({"state_dict": weights, "meta": Called()}, "sly.pth")
    finally:
        del Executed.__call__  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"sly\.pth is not a readable"):
        read_tensors(Path("sly.pth"), "model.init_from")
    assert not Path("ran").exists()
    torch.load("sly.pth", weights_only=False)
    assert Path("ran").exists()


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")
def test_files_that_hold_no_weights_say_what_they_are(weights: OrderedDict[str, torch.Tensor]) -> None:
    torch.save(torch.nn.Linear(2, 2), "module.pt")
    torch.jit.script(torch.nn.Linear(2, 2)).save("script.pt")
    torch.save({"epoch": 3}, "empty.pt")
    torch.save(weights, "cut.pt")
    Path("cut.pt").write_bytes(Path("cut.pt").read_bytes()[:-300])
    torch.save(weights, "old.pt", _use_new_zipfile_serialization=False)
    Path("old.pt").write_bytes(Path("old.pt").read_bytes()[:-20])
    save_file(weights, "cut.safetensors")
    Path("cut.safetensors").write_bytes(Path("cut.safetensors").read_bytes()[:-4])
    Path("nothing.pt").touch()
    Path("page.pth").write_text("<!DOCTYPE html><html>not found</html>")
    Path("folder").mkdir()
    wrong = {
        "module.pt": r"module\.pt holds no state dict .* store its state_dict\(\) instead",
        "script.pt": "is a TorchScript archive",
        "empty.pt": "holds no state dict",
        "cut.pt": "not a readable .* it is cut off",
        "old.pt": "not a readable",
        "cut.safetensors": r"not a readable .*SafetensorError",
        "nothing.pt": "not a readable .* it is empty",
        "page.pth": "not a readable",
        "folder": "folder is a folder",
        "none.pt": "there is no such file",
    }
    for name, message in wrong.items():
        with pytest.raises(UserError, match=message) as caught:
            read_tensors(Path(name), "model.init_from")
        assert str(caught.value).startswith(f"model.init_from: {name}")
        assert "weights_only" not in str(caught.value)


def test_digest_and_list() -> None:
    Path("abc").write_bytes(b"abc")
    assert file_digest(Path("abc")) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert listed(list("abc"), 2) == "a, b and 1 more"
    assert listed(list("ab"), 2) == "a, b"
