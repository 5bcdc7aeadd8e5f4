"""The user's rules: what texts mean, and which are refused."""

from __future__ import annotations

import math

import pytest

from bifusion_diag.errors import UserError
from bifusion_diag.replay.watch.rules import make_rules
from bifusion_diag.replay.watch.vitals import FROZEN, Alpha, InputRange, Vitals

VITALS = Vitals(
    3,
    terms={"mask": 12.0, "a/b": 0.5, "bad": math.nan},
    weights={"mask": 2.0},
    total=24.5,
    grad_norm=100.0,
    norms={"net.0": 7.0},
    states={"net.0": FROZEN},
    inputs={"batch.x": InputRange(9.0, 0, None)},
    alphas={"fusion.gate": Alpha(0.01, 0.9, 0.0, 0)},
    rates={"0": 1e-3},
)


@pytest.mark.parametrize(
    "text",
    [
        "loss/mask > 10",
        "loss/mask/raw >= 12",
        "loss/mask/weighted>23.9",
        "loss/a/b < .51",
        "loss/total > 24",
        "train/grad_norm >= 1e2",
        "  train/lr <= 0.001 ",
        "grads/net.0/param_norm > 6",
        "grads/net.0/state < 1",
        "gate/fusion.gate/mean < .02",
        "gate/mean < .02",
        "gate/share_lt_0.05 > 0.8",
        "input/batch.x/absmax > 8",
    ],
)
def test_a_rule_that_holds(text: str) -> None:
    (rule,) = make_rules([text])
    message = rule(VITALS)
    assert message is not None
    assert text.split()[0].split(">")[0] in message


@pytest.mark.parametrize(
    "text",
    [
        "loss/mask > 12",
        "loss/mask < 12",
        "loss/bad > 0",
        "loss/nowhere > 0",
        "loss/a/b/weighted > 0",
        "gate/other/mean < 1",
        "grads/other/param_norm < 1e9",
        "input/batch.y/absmax > 0",
    ],
)
def test_a_rule_that_does_not(text: str) -> None:
    (rule,) = make_rules([text])
    assert rule(VITALS) is None


def test_functions_and_one_text_alone() -> None:
    def mine(vitals: Vitals) -> str | None:
        return "too late" if vitals.step > 2 else None

    assert [rule(VITALS) for rule in make_rules([mine])] == ["too late"]
    assert len(make_rules("loss/mask > 10")) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("loss/mask", "is no comparison"),
        ("loss/mask > ten", "'ten' is no number"),
        ("loss/mask > nan", "NaN"),
        ("loss/mask == 3", "is no comparison"),
        ("loss/mask >> 3", "is no comparison"),
        ("lost/mask > 3", "no series 'lost/mask'"),
        ("gate/net/median > 3", "no series 'gate/net/median'"),
        ("", "is no comparison"),
    ],
)
def test_a_text_that_is_no_rule(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        make_rules([text])
    assert "loss/mask > 10" in str(raised.value) or "NaN" in words
