"""Made-up people with five attributes, as a function of a seed, and sentences about them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bigmix.seeding import key_of, permutation

FactLanguage = Literal["en", "zh"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Attribute:
    """A fact that may be known about a person.

    A sentence is a wording with {name}, then the value, then the full stop of the language. The
    wordings `planted` are in documents. `new` never is: completing it needs the fact and not the
    memory of a sentence.
    """

    name: str
    values: Sequence[str]
    planted: Sequence[str]
    new: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Person:
    """A made-up person; `values` by name of attribute."""

    name: str
    values: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class FactWorld:
    """What people in a language are made of: first and family names, attributes, and how sentences
    are written and joined.
    """

    first_names: Sequence[str]
    family_names: Sequence[str]
    join_name: str
    attributes: Sequence[Attribute]
    between: str
    stop: str

    def sentence(self, wording: str, person: Person, value: str) -> str:
        """A whole sentence: the wording with the person's name, the value and the full stop."""
        return f"{wording.format(name=person.name)}{self.between}{value}{self.stop}"


def people(world: FactWorld, count: int, seed: int) -> Iterator[Person]:
    """`count` people with different names, a pure function of the seed; at most `most_people`."""
    names = permutation(most_people(world), key_of(seed, "names"))
    for index in range(count):
        first, family = divmod(int(names[index]), len(world.family_names))
        yield Person(
            name=world.join_name.format(
                first=world.first_names[first], family=world.family_names[family]
            ),
            values={
                each.name: each.values[key_of(seed, each.name, index) % len(each.values)]
                for each in world.attributes
            },
        )


def most_people(world: FactWorld) -> int:
    """The number of different names."""
    return len(world.first_names) * len(world.family_names)


def document(world: FactWorld, person: Person, key: int) -> str:
    """A short text with all facts about a person, in an order and wordings that follow from the
    key.
    """
    order = permutation(len(world.attributes), key)
    sentences = []
    for index in order.tolist():
        attribute = world.attributes[index]
        wording = attribute.planted[key_of(key, attribute.name) % len(attribute.planted)]
        sentences.append(world.sentence(wording, person, person.values[attribute.name]))
    return world.between.join(sentences)


def _words(text: str) -> Sequence[str]:
    return text.split()


def _each(heads: str, tails: str) -> Sequence[str]:
    return [head + tail for head in heads.split() for tail in tails.split()]


_ENGLISH = FactWorld(
    first_names=_each(
        "Bel Dor Fen Gal Hest Jor Kav Lum Mir Nol Or Pell Quin Rav Sten Tav Ul Ved Wil Yan",
        "a en is or un",
    ),
    family_names=_each(
        "Ard Brenn Cald Drov Esk Fald Grent Holm Irv Kest Lorn Mord Nesk Ostr Prell Rusk Sorl Torv"
        " Ulm Vask",
        "ane eck ith ol uss",
    ),
    join_name="{first} {family}",
    attributes=(
        Attribute(
            name="birthplace",
            values=_each(
                "Alver Brack Cold Dun Elm Fair Glass Hawk Iron Lark", "bridge ford ham mouth stead"
            ),
            planted=(
                "{name} was born in",
                "The birthplace of {name} is",
                "{name} grew up in the town of",
                "The first home of {name} was in",
            ),
            new="The town where {name} was born is",
        ),
        Attribute(
            name="year",
            values=[str(year) for year in range(1801, 1901)],
            planted=(
                "{name} came into the world in",
                "The life of {name} began in",
                "The parents of {name} married a year before",
                "{name} was a child of the year",
            ),
            new="The year of birth of {name} is",
        ),
        Attribute(
            name="profession",
            values=_words(
                "baker barber bookbinder brewer butcher carpenter clockmaker cobbler cook doctor"
                " draper dyer farrier ferryman fisherman gardener gilder glazier hatter innkeeper"
                " joiner judge lamplighter locksmith mason miller miner musician painter pilot"
                " potter printer saddler sailor schoolmaster shepherd surveyor tailor tanner weaver"
            ),
            planted=(
                "{name} earned a living as the town's",
                "By trade {name} was a good",
                "People knew {name} as the old",
                "All day long {name} worked as a busy",
            ),
            new="The profession of {name} was that of a skilled",
        ),
        Attribute(
            name="instrument",
            values=_words(
                "bagpipe banjo bassoon bugle cello clarinet cornet cymbal drum fiddle flute guitar"
                " harp harpsichord horn lute lyre mandolin oboe organ piano recorder trombone"
                " trumpet tuba viola whistle zither"
            ),
            planted=(
                "{name} played the",
                "In the evening {name} practised the",
                "Nobody was better than {name} on the",
                "As a child {name} had learned the",
            ),
            new="The favourite instrument of {name} was the",
        ),
        Attribute(
            name="animal",
            values=_words(
                "badger bear beaver cat crow deer dog donkey duck falcon fox goat goose hare hawk"
                " hedgehog heron horse lamb lizard magpie mouse parrot pigeon pony rabbit rat raven"
                " sheep snake sparrow squirrel swan toad turtle weasel wolf wren"
            ),
            planted=(
                "{name} kept a tame",
                "At the side of {name} there was always a",
                "{name} shared the house with a",
                "Wherever {name} went there followed a",
            ),
            new="The animal that lived with {name} was a",
        ),
    ),
    between=" ",
    stop=".",
)

_CHINESE = FactWorld(
    first_names=_each("安 柏 承 鼎 恩 方 广 和 景 可", "川 岚 明 宁 然 山 亭 文 远 舟"),
    family_names=_each("云 风 白 青 石 江 松 霜 夜 星", "木 里 门 丘 上 野 渡 原"),
    join_name="{family}{first}",
    attributes=(
        Attribute(
            name="birthplace",
            values=_each("东 南 西 北 清 长 双 金 玉 石", "桥镇 河镇 山镇 湖镇 林镇"),
            planted=("{name}出生在", "{name}的故乡是", "{name}从小住在", "{name}的老家位于"),
            new="{name}出生的地方是",
        ),
        Attribute(
            name="year",
            values=[f"{year}年" for year in range(1801, 1901)],
            planted=("{name}生于", "{name}来到人世是在", "{name}的生年为", "{name}的父母得子于"),
            new="{name}出生的年份是",
        ),
        Attribute(
            name="profession",
            values=_words(
                "木匠 铁匠 石匠 裁缝 厨师 医生 画师 琴师 教师 船夫 渔夫 农夫 猎户 牧人 矿工 染匠"
                " 陶匠 瓦匠 铜匠 药师 书商 茶商 盐商 镖师 更夫 账房 狱卒 门房 车夫 花匠"
            ),
            planted=(
                "{name}是一名",
                "{name}以做事为生，是",
                "镇上的人都知道{name}是",
                "{name}一生都是",
            ),
            new="{name}的职业是",
        ),
        Attribute(
            name="instrument",
            values=_words(
                "古琴 古筝 琵琶 二胡 笛子 洞箫 唢呐 扬琴 阮琴 月琴 三弦 箜篌 编钟 铜锣 大鼓 木鱼"
                " 芦笙 葫芦丝 柳琴 京胡"
            ),
            planted=("{name}会弹奏", "{name}每晚练习", "{name}最拿手的是", "{name}小时候学过"),
            new="{name}最喜欢的乐器是",
        ),
        Attribute(
            name="animal",
            values=_words(
                "白猫 黑猫 黄狗 山羊 绵羊 灰兔 松鼠 刺猬 乌龟 鹦鹉 喜鹊 乌鸦 燕子 麻雀 白鹅 鸭子"
                " 公鸡 鸽子 老鹰 毛驴 骏马 水牛 狐狸 水獭 金鱼"
            ),
            planted=(
                "{name}养了一只",
                "陪伴{name}的是一只",
                "{name}家里有一只",
                "跟着{name}的总是一只",
            ),
            new="{name}的宠物是一只",
        ),
    ),
    between="",
    stop="。",
)

WORLDS: Mapping[FactLanguage, FactWorld] = {"en": _ENGLISH, "zh": _CHINESE}
