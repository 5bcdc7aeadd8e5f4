"""Sentences that can be said in another language."""

from __future__ import annotations

import copy
import json
import pickle

from bifusion_diag.diagnosis.phrase import Name, join, say, translated

KNOWN = {
    "{count} of {total} steps": "共 {total} 步中的 {count} 步",
    "stable": "稳定",
    "The run is {state}.": "运行{state}。",
}


def test_a_phrase_is_its_english_text() -> None:
    phrase = say("{count} of {total} steps", count=3, total=9)
    assert phrase == "3 of 9 steps"
    assert json.dumps(phrase) == '"3 of 9 steps"'
    assert copy.deepcopy(phrase).template == phrase.template
    assert pickle.loads(pickle.dumps(phrase)).values == {"count": 3, "total": 9}


def test_values_change_their_order_and_are_said_too() -> None:
    assert translated(say("{count} of {total} steps", count=3, total=9), KNOWN.get) == "共 9 步中的 3 步"
    assert translated(say("The run is {state}.", state="stable"), KNOWN.get) == "运行稳定。"


def test_joined_sentences_are_said_one_by_one() -> None:
    both = join(["", say("The run is {state}.", state="stable"), "Unknown words."])
    assert both == "The run is stable. Unknown words."
    assert translated(both, KNOWN.get, lambda separator: "") == "运行稳定。Unknown words."
    assert pickle.loads(pickle.dumps(both)) == both


def test_an_unknown_template_stays_english() -> None:
    assert translated(say("{n} apples", n=2), KNOWN.get) == "2 apples"


def test_names_are_said_as_they_are() -> None:
    known = {
        **KNOWN,
        "criterion": "标准",
        "It starts in {place}.": "始于{place}。",
        "{name} is {state}.": "{name}：{state}。",
    }
    assert translated(say("It starts in {place}.", place="criterion"), known.get) == "始于标准。"
    assert translated(say("It starts in {place}.", place=Name("criterion")), known.get) == "始于criterion。"
    assert translated(say("{name} is {state}.", name="stable", state="stable"), known.get) == "stable：稳定。"
    copied = pickle.loads(pickle.dumps(say("It starts in {place}.", place=Name("criterion"))))
    assert translated(copied, known.get) == "始于criterion。"
