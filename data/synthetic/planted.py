"""The planted effect: the same sound means another class, depending on what cannot be heard.

A field of the metadata divides the cycles into two groups. Which events are *heard* in a cycle is
drawn without regard to the group; how the cycle is *annotated* depends on both:

    heard                  first group    second group
    nothing                normal         normal
    crackles               crackle        normal
    wheezes                normal         crackle
    crackles and wheezes   both           wheeze

Crackles alone and wheezes alone are equally frequent, so the field by itself tells neither
whether a cycle is abnormal nor whether it is a crackle: only sound and field together do.
`best_score` gives the ICBHI Score that the best possible rule reaches with what it may see.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

#: Heard state = crackles + 2 * wheezes, as in CLASSES; share of the cycles in that state.
#: Both corpora are annotated with the same class frequencies.
PLAIN_MIX: tuple[float, ...] = (0.52, 0.24, 0.12, 0.12)
PLANTED_MIX: tuple[float, ...] = (0.28, 0.24, 0.24, 0.24)

#: Heard states of a device whose prior turns round between the halves: mostly abnormal in training,
#: mostly normal in the test half.
REVERSED_MIX: dict[str, tuple[float, ...]] = {
    "train": (0.15, 0.35, 0.25, 0.25),
    "test": (0.85, 0.07, 0.04, 0.04),
}
REVERSED_DEVICE = "Meditron"  # in the study of it
#: Share of the patients of either half that are recorded with it.
REVERSED_SHARE = 0.4

#: RULE[group, heard] -> class
RULE: np.ndarray = np.array([[0, 1, 0, 3], [0, 0, 1, 2]])

#: Fields that can be planted, and the values that form the second group.
SECOND_GROUP: dict[str, tuple[str, ...]] = {
    "site": ("Ll", "Lr", "Pl", "Pr"),
    "device": ("Litt3200", "Meditron"),
    "age": ("adult",),
}
ADULT_AGE = 18  # years


def group_of(field: str, *, site: str, device: str, age: float | None) -> int:
    """0 or 1: the group of a cycle under the planted `field`; age in years."""
    if field == "age":
        value = "adult" if age >= ADULT_AGE else "child"
    else:
        value = {"site": site, "device": device}[field]
    return int(value in SECOND_GROUP[field])


def best_mass_score(mass: np.ndarray) -> float:
    """Highest ICBHI Score (0..100) of any rule that maps an observation to a class.

    With m(o, c) the mass of observation o in class c, N = sum of m(., 0) and A the mass of all
    other classes, a rule r has Sp = sum over r(o) = 0 of m(o, 0) / N and Se = sum over r(o) > 0
    of m(o, r(o)) / A. The Score (Sp + Se) / 2 is a sum over observations, so the best rule picks
    for each the larger of m(o, 0) / N and max over c > 0 of m(o, c) / A: not the most probable
    class, as for accuracy, but the one that is heaviest within its half of the Score.

    Args:
        mass: [O, C] counts or probabilities; column 0 is normal.
    """
    mass = np.asarray(mass, np.float64)
    totals = np.array([mass[:, 0].sum(), *[mass[:, 1:].sum()] * (mass.shape[1] - 1)])
    if (totals == 0).any():
        raise ValueError("the Score needs normal and abnormal cycles")
    return float(50 * (mass / totals).max(axis=1).sum())


def best_score(
    observations: Sequence[Hashable],
    classes: Sequence[int],
    n_cls: int = 4,
    weights: Sequence[float] | None = None,
) -> float:
    """`best_mass_score` of a table: what is seen of each cycle, and the cycle's class (0..3).

    The rule may be fitted to this very table, so the result bounds every rule from above.
    With n_cls 2 the classes are collapsed to normal and abnormal. `weights`: each row's mass,
    1 by default.
    """
    classes = np.minimum(np.asarray(classes), n_cls - 1)
    rows = {seen: row for row, seen in enumerate(dict.fromkeys(observations))}
    mass = np.zeros((len(rows), n_cls))
    where = ([rows[seen] for seen in observations], classes)
    np.add.at(mass, where, 1 if weights is None else np.asarray(weights))
    return best_mass_score(mass)


def reachable_scores(
    heard: Sequence[int],
    group: Sequence[int],
    classes: Sequence[int],
    weights: Sequence[float] | None = None,
) -> dict[str, dict[str, float]]:
    """Best Score of rules that hear everything, without and with the field, and of the field alone.

    Args:
        heard: [N] heard state 0..3.
        group: [N] 0 or 1.
        classes: [N] 0..3.
        weights: [N] mass of each row, 1 by default.

    Returns:
        {"4": {"sound": .., "sound_and_field": .., "field": ..}, "2": {...}}, in 0..100; the keys
        are dataset.n_cls.
    """
    seen = {
        "sound": list(heard),
        "sound_and_field": list(zip(heard, group, strict=True)),
        "field": list(group),
    }
    return {
        str(n_cls): {name: best_score(rows, classes, n_cls, weights) for name, rows in seen.items()}
        for n_cls in (4, 2)
    }


def expected_scores(second_share: float = 0.5) -> dict[str, dict[str, float]]:
    """`reachable_scores` of endlessly many cycles, `second_share` of them in the second group."""
    shares = (1 - second_share, second_share)
    group, heard = np.divmod(np.arange(RULE.size), len(PLANTED_MIX))
    weights = [PLANTED_MIX[h] * shares[g] for g, h in zip(group, heard, strict=True)]
    return reachable_scores(heard, group, RULE[group, heard], weights)
