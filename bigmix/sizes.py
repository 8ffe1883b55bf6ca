"""Sizes of sources go in, the shares that follow from them come out: by a temperature, or as even as epochs allow."""

from collections.abc import Iterator, Mapping

from bigmix.recipe import Recipe
from bigmix.recipe.shares import Temperature, UniMax

SIZE_DIGITS = 6  # shares by a temperature are kept to one part in a million


def by_temperature(recipe: Recipe, tokens: Mapping[str, int]) -> dict[str, float]:
    """The shares of sources with a temperature: tokens to its power, as parts of their group."""
    found: dict[str, float] = {}
    for level in {source.group for source in recipe.sources.values()}:
        powers = {
            name: source.share.temperature
            for name, source in recipe.sources.items()
            if isinstance(source.share, Temperature) and source.group == level
        }
        largest = max((tokens[name] for name in powers), default=1)
        sizes = {name: (tokens[name] / largest) ** power for name, power in powers.items()}
        total, least = sum(sizes.values()), 10.0**-SIZE_DIGITS
        found |= {name: max(round(n / total, SIZE_DIGITS), least) for name, n in sizes.items()}
    return found


def levels_of_unimax(recipe: Recipe) -> Iterator[dict[str, float]]:
    """The sources that divide rows by UniMax among themselves, with the epochs that each may come to."""
    for level in dict.fromkeys(source.group for source in recipe.sources.values()):
        epochs = {
            name: source.share.unimax
            for name, source in recipe.sources.items()
            if isinstance(source.share, UniMax) and source.group == level
        }
        if epochs:
            yield epochs


def unimax(capacities: Mapping[str, int], rows: int) -> dict[str, int]:
    """The rows of each source: the same for all but those that have fewer, which give all; less than `rows` where none has more.

    Chung et al., "UniMax: Fairer and more effective language sampling", 2023, algorithm 1, in whole rows.
    """
    given: dict[str, int] = {}
    for name in sorted(capacities, key=lambda name: (capacities[name], name)):
        even = (rows - sum(given.values())) // (len(capacities) - len(given))
        given[name] = min(capacities[name], even)
    return {name: given[name] for name in capacities}
