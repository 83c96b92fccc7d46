"""The chain of records: any change, removal or reordering is found."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s4mil_monai.batch.provenance import FIRST, check_chain, link, write_record


def make_chain(n=5):
    links, previous = [], FIRST
    for number in range(1, n + 1):
        links.append(link(number, previous, write_record({"slide": number})))
        previous = links[-1].hash
    return links


def problems(links, head=None):
    whole = make_chain()
    return [str(found) for found in check_chain(links, head=head or (5, whole[-1].hash))]


def test_hash_is_that_of_number_previous_hash_and_text():
    # printf '1\n%064d\n{"slide":1}' 0 | sha256sum
    assert make_chain()[0].hash == "ea9fd8f24028ae1e460c38e5c76512b60c0f313aa31cb6a9101bf869bea8f3fb"


def test_an_untouched_chain_has_no_problem():
    assert problems(make_chain()) == []
    assert list(check_chain([], head=(0, FIRST))) == []


@given(place=st.integers(0, 4), change=st.sampled_from(["record", "hash", "previous"]))
def test_a_changed_record_is_found(place, change):
    links = make_chain()
    value = write_record({"slide": 99}) if change == "record" else "f" * 64
    links[place] = dataclasses.replace(links[place], **{change: value})
    assert any(f"record {place + 1}" in found or f"record {place + 2}" in found for found in problems(links))


@given(place=st.integers(0, 4))
def test_a_removed_record_is_found(place):
    links = make_chain()
    del links[place]
    assert problems(links) != []


@given(st.permutations(range(5)))
def test_another_order_is_found(order):
    links = make_chain()
    found = problems([links[i] for i in order])
    assert (found == []) == (list(order) == [0, 1, 2, 3, 4])


def test_a_chain_that_was_written_anew_has_another_end():
    links, previous = [], FIRST
    for number in range(1, 6):
        links.append(link(number, previous, write_record({"slide": number if number != 2 else 99})))
        previous = links[-1].hash
    assert problems(links) == ["record 5: is the last there is, but the chain ended with record 5"]


def test_the_text_of_a_record_does_not_depend_on_the_order_of_its_facts():
    assert write_record({"b": 1, "a": "ü"}) == write_record({"a": "ü", "b": 1}) == '{"a":"\\u00fc","b":1}'
    with pytest.raises(ValueError, match="Out of range"):
        write_record({"probability": float("nan")})
