"""Names of splits, as folders, archives and files carry them. Pure: names in, splits out.

The words are those of the Hugging Face hub, in any case. A folder that is called by such a word alone (`Train`, `validation`)
is a split. Folders whose names hold one among other words (`seg_train` and `seg_test`, `train2017` and `val2017`) are splits
where the rest of all their names is the same: a class can be a `bullet_train`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def split_of(name: str) -> str:
    """The split that a folder of this name is: train, val or test; "" for another name."""
    return _WORDS.get(name.casefold(), "")


def splits_in(name: str) -> set[str]:
    """The splits whose words are in a name, such as {"train"} for `my-train-00000-of-00002`."""
    return {_WORDS[part] for part in _parts(name) if part in _WORDS}


def splits_of(names: Collection[str]) -> dict[str, str]:
    """The split of every folder of `names`, which lie side by side; {} unless all of them are splits.

    A single folder whose name holds more than the split's word is one, too; two are where only the words differ.
    """
    exact = {name: split_of(name) for name in names}
    if all(exact.values()):
        return exact
    if any(len(splits_in(name)) != 1 for name in names) or len({_rest(name) for name in names}) > 1:
        return {}
    return {name: splits_in(name).pop() for name in names}


def files_by_split(names: Iterable[str]) -> dict[str, str]:
    """The split of every file by the words in its name, else in those of its folders, the nearest first; "" where none says.

    Raises ValueError for a name with the words of two splits.
    """
    found = {}
    for name in names:
        said = next((splits for part in reversed(name.split("/")) if (splits := splits_in(part))), {""})
        if len(said) > 1:
            raise ValueError(f"{name} names {' and '.join(sorted(said))}")
        found[name] = said.pop()
    return found


def _parts(name: str) -> list[str]:
    """Words, and what is between them: `TrainImages_2017` is train, _, images, _2017."""
    return re.findall("[a-z]+|[^a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", "_", name).casefold())


def _rest(name: str) -> tuple[str, ...]:
    return tuple("" if part in _WORDS else part for part in _parts(name))
