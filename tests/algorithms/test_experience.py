"""The parts of an experience, of every field that it has."""

from __future__ import annotations

import dataclasses

import torch

from fastppo.algorithms.experience import Experience


def test_select_cuts_every_field_to_the_columns_that_are_asked_for():
    """4 sequences, prompts of 5 columns, completions of 7; sizes tell the dimensions apart."""
    batch, per_token = (4,), (4, 7)
    shapes = dict.fromkeys(("sequences", "attention_mask"), (4, 12)) | dict.fromkeys(
        ("scores", "ended", "groups"), batch
    )
    shapes |= {
        "objective_scores": (4, 3),
        "objective_token_scores": (4, 7, 3),
        "old_values": (4, 7, 3),
        "returns": (4, 7, 3),
    }
    shapes |= dict.fromkeys(("ref_hidden", "old_hidden", "target_hidden"), (4, 7, 2))
    fields = {field.name for field in dataclasses.fields(Experience)} - {"objectives"}
    given = {name: torch.randn(shapes.get(name, per_token)) for name in fields}
    experience = Experience(**given, objectives={"x": 1.0})
    rows = torch.tensor([2, 0, 2])
    part = experience.select(rows, 3, 6)
    assert part.objectives == experience.objectives
    for name, whole in given.items():
        columns = {12: slice(2, 11), 7: slice(0, 6)}.get(whole.shape[1] if whole.dim() > 1 else 0, slice(None))
        expected = whole[rows] if whole.dim() == 1 else whole[rows][:, columns]
        assert torch.equal(getattr(part, name), expected), name
    for name, whole in given.items():
        assert torch.equal(getattr(experience.select(rows), name), whole[rows]), name
