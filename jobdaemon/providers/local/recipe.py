"""
Which look an image of an order gets: a planned table, steered by words of the prompt.

Ten families take turns, and within a family the seven looks differ in background, colour and finish at once; framings take turns
at a length (11) that shares no factor with either. So neighbours never look alike, a small order sees every family, and the same
look comes back only after 770 images.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeVar

from jobdaemon.providers.local.backgrounds import ORIGINAL, SCENES
from jobdaemon.providers.local.crops import CROPS, Crop
from jobdaemon.providers.local.finishes import FINISHES
from jobdaemon.providers.local.grades import DUOTONE, GRADES

Option = TypeVar("Option")


@dataclass(frozen=True, slots=True)
class Recipe:
    """
    One look.

    Attributes:
        crop: the framing.
        background: a name of ``SCENES``, or ``ORIGINAL``.
        grade: a name of ``GRADES``.
        finish: a name of ``FINISHES``.
        variant: moves leaks, shadows and grain about.
    """

    crop: Crop
    background: str
    grade: str
    finish: str
    variant: int

    @property
    def description(self) -> str:
        """For people, and for the picture's EXIF: what was done, and that no model made it."""
        parts = [part for part in (self.background, self.grade, self.finish) if part not in {"natural", "clean"}]
        return f"jobdaemon local style: {', '.join(parts)}, {self.crop.name}; not generative AI"


_STUDIO = (
    ("studio grey", "natural", "clean"),
    ("studio white", "crisp", "clean"),
    ("studio blue", "cool", "vignette"),
    ("studio sand", "warm", "soft glow"),
    ("studio charcoal", "rich chrome", "clean"),
    ("studio blush", "pastel", "soft glow"),
    ("studio mustard", "matte", "vignette"),
)
_OWN = (
    ("soft blur", "golden hour", "clean"),
    (ORIGINAL, "moody green", "vignette"),
    ("night blur", "teal and orange", "clean"),
    ("bright haze", "pastel", "clean"),
    ("blue hour blur", "dusk", "fairy lights"),
    ("warm blur", "matte", "fairy lights"),
    (ORIGINAL, "crisp", "vignette"),
)
_MONO = (
    ("studio charcoal", "black and white", "vignette"),
    ("studio white", "high key mono", "clean"),
    (ORIGINAL, "high contrast mono", "pushed film"),
    ("silver spotlight", "sepia", "film look"),
    ("night blur", "low key mono", "window light"),
    ("umber canvas", "platinum", "soft glow"),
    ("slate gradient", "selenium", "pushed film"),
)
_SPOT = (
    ("navy spotlight", "natural", "vignette"),
    ("burgundy spotlight", "warm", "clean"),
    ("emerald spotlight", "rich chrome", "film look"),
    ("amber spotlight", "golden hour", "vignette"),
    ("violet spotlight", "cool", "soft glow"),
    ("olive canvas", "matte", "film look"),
    ("storm canvas", "bleach bypass", "clean"),
)
_FILM = (
    (ORIGINAL, "faded", "film look"),
    ("soft blur", "rich chrome", "film look"),
    (ORIGINAL, "cross process", "pushed film"),
    ("studio sage", "faded", "negative frame"),
    (ORIGINAL, "warm", "orange light leak"),
    ("bright haze", "cool", "pushed film"),
    ("studio teal", "bleach bypass", "film look"),
)
_DUOTONE = (
    ("studio white", "duotone navy and peach", "clean"),
    (ORIGINAL, "duotone teal and cream", "clean"),
    ("silver spotlight", "duotone violet and yellow", "halftone print"),
    ("soft blur", "cyanotype", "white mat"),
    ("studio white", "duotone wine and rose", "poster print"),
    ("studio charcoal", "duotone ink and orange", "pushed film"),
    ("bright haze", "duotone forest and mint", "clean"),
)
_LIGHT = (
    ("studio sand", "warm", "window light"),
    ("studio charcoal", "natural", "blue and magenta gels"),
    ("soft blur", "matte", "pink light leak"),
    ("studio grey", "cool", "teal and amber gels"),
    (ORIGINAL, "pastel", "rainbow light leak"),
    ("studio red", "crisp", "window light"),
    ("neon gradient", "dusk", "clean"),
)
_PAINT = (
    ("umber canvas", "rich chrome", "oil painting"),
    ("studio white", "crisp", "watercolour"),
    (ORIGINAL, "natural", "charcoal drawing"),
    ("emerald spotlight", "golden hour", "oil painting"),
    ("mint gradient", "pastel", "watercolour"),
    ("storm canvas", "dusk", "oil painting"),
    ("citrus gradient", "warm", "watercolour"),
)
_FRAME = (
    ("studio sky", "natural", "white mat"),
    (ORIGINAL, "rose", "instant print"),
    ("studio lilac", "crisp", "navy mat"),
    ("studio white", "warm", "terracotta mat"),
    (ORIGINAL, "black and white", "negative frame"),
    ("sunset gradient", "faded", "instant print"),
    ("night blur", "cool", "white mat"),
)
_GRAPHIC = (
    ("ocean gradient", "crisp", "clean"),
    ("red sunburst", "warm", "poster print"),
    ("coral and cream wall", "crisp", "clean"),
    ("blue and yellow wall", "rich chrome", "halftone print"),
    ("dawn gradient", "rose", "soft glow"),
    ("teal sunburst", "faded", "halftone print"),
    ("green and pink wall", "matte", "clean"),
)
_FAMILIES = (_STUDIO, _OWN, _MONO, _SPOT, _FILM, _GRAPHIC, _LIGHT, _PAINT, _DUOTONE, _FRAME)
#: Images that all differ in background, colour and finish; from here on only the framing is new.
PLANNED = sum(len(family) for family in _FAMILIES)


def recipe_for(index: int, prompt: str) -> Recipe:
    """
    The look of one image: the same for the same *index* and *prompt*, another one for every other index.

    Args:
        index: the image's place in its order, from 0.
        prompt: any text; words that name a look or a background colour are followed, the rest is not understood.
    """
    family = _FAMILIES[index % len(_FAMILIES)]
    background, grade, finish = family[index // len(_FAMILIES) % len(family)]
    wish = wish_of(prompt)
    if wish.backgrounds:
        background = _turn(wish.backgrounds, index)
    if wish.grades:
        grade = _turn(wish.grades, index)
    if wish.finishes:
        finish = _turn(wish.finishes, index)
    return Recipe(CROPS[index % len(CROPS)], background, grade, finish, index)


def _turn(options: tuple[Option, ...], index: int) -> Option:
    """Options in turn, one place further on each round: two lists of the same length do not stay in step."""
    return options[(index + index // len(options)) % len(options)]


@dataclass(frozen=True, slots=True)
class Wish:
    """What a prompt narrows down; an empty tuple leaves the planned table alone."""

    backgrounds: tuple[str, ...] = ()
    grades: tuple[str, ...] = ()
    finishes: tuple[str, ...] = ()


_NEUTRAL = ("clean", "vignette", "film look", "pushed film", "soft glow", "window light", "white mat", "negative frame")
_TRUE_COLOURS = ("natural", "crisp", "warm", "rich chrome", "cool", "matte", "pastel")
_FILM_FINISHES = ("film look", "pushed film", "orange light leak", "negative frame", "pink light leak", "rainbow light leak")
_AGED = ("faded", "sepia", "matte", "cross process", "warm")
_GREYS = ("black and white", "high contrast mono", "low key mono", "high key mono")
#: Backgrounds that still differ when all colour is gone: dark, light, patterned, the photo's own.
_TONES = (
    "studio white",
    "studio charcoal",
    ORIGINAL,
    "silver spotlight",
    "blue and yellow wall",
    "night blur",
    "studio grey",
    "red sunburst",
    "slate gradient",
    "bright haze",
    "navy spotlight",
    "umber canvas",
    "ocean gradient",
)
_STUDIOS = tuple(name for name in SCENES if name.startswith("studio"))
_BLURS = ("soft blur", "bright haze", "warm blur", "night blur", "blue hour blur")

#: Words (regular expressions, on lower-case text) and what they ask for. Later lines win where two speak of the same thing.
_WORDS: tuple[tuple[str, Wish], ...] = (
    (r"\bstudio\b|headshot|passport|\blinkedin\b|证件照|棚拍", Wish(backgrounds=_STUDIOS)),
    (r"\bbokeh\b|blurred background|blurry background|shallow depth|背景虚化|虚化", Wish(backgrounds=_BLURS)),
    (r"\bfilm\b|analogue?\b|kodak|fuji|\b35 ?mm\b|胶片", Wish(finishes=_FILM_FINISHES)),
    (
        r"\bvintage\b|\bretro\b|复古",
        Wish(grades=_AGED, finishes=("film look", "instant print", "orange light leak", "pushed film")),
    ),
    (r"cinematic|movie|电影", Wish(grades=("teal and orange", "bleach bypass", "moody green", "dusk"))),
    (r"golden hour|sunset|黄昏|夕阳", Wish(grades=("golden hour", "warm", "teal and orange"))),
    (r"\bpastel\b", Wish(grades=("pastel", "rose"))),
    (r"\bneon\b|cyberpunk|霓虹|赛博", Wish(finishes=("blue and magenta gels", "teal and amber gels", "fairy lights"))),
    (r"light ?leak|漏光", Wish(finishes=("orange light leak", "pink light leak", "rainbow light leak"))),
    (r"polaroid|instant (?:photo|print)|拍立得", Wish(finishes=("instant print",))),
    (r"\bpainting\b|painterly|\bpainted\b", Wish(finishes=("oil painting", "watercolour"))),
    (r"water ?colou?r|aquarelle|水彩", Wish(finishes=("watercolour",))),
    (r"\boil\b|oil paint|impasto|油画", Wish(finishes=("oil painting",))),
    (r"sketch|charcoal drawing|pencil|\bdrawing\b|素描", Wish(finishes=("charcoal drawing",))),
    (r"poster|pop ?art|screen ?print|海报|波普", Wish(finishes=("poster print", "halftone print"))),
    (r"comic|halftone|漫画", Wish(finishes=("halftone print",))),
    (r"duotone|双色", Wish(_TONES, DUOTONE, _NEUTRAL)),
    (r"\bsepia\b", Wish(_TONES, ("sepia", "platinum"), _NEUTRAL)),
    (r"cyanotype|blueprint", Wish(_TONES, ("cyanotype",), _NEUTRAL)),
    (r"black[ -]?(?:and|&|n)[ -]?white|\bb ?& ?w\b|monochrom|gr[ae]yscale|\bnoir\b|黑白", Wish(_TONES, _GREYS, _NEUTRAL)),
)
_COLOURS = {
    "blue": "blue|navy|azure|蓝色?",
    "red": "red|crimson|scarlet|红色?",
    "green": "green|emerald|olive|teal|绿色?",
    "grey": "gr[ae]y|silver|灰色?",
    "white": "white|白色?",
    "black": "black|dark|黑色?",
    "pink": "pink|rose|粉色?|粉红色?",
    "yellow": "yellow|mustard|黄色?",
    "purple": "purple|violet|lilac|紫色?",
    "orange": "orange|橙色?",
    "beige": "beige|sand|cream|米色?",
    "brown": "brown|棕色?",
}
_PLACE = "background|backdrop|wall|背景"
# Painted, printed and inked looks may be wished for at the same time, and a wish must never become slow on a long prompt.
_MOST_PROMPT_CHARACTERS = 4_000


def wish_of(prompt: str) -> Wish:
    """What the words of *prompt* ask for."""
    text = prompt[:_MOST_PROMPT_CHARACTERS].lower()
    backgrounds: tuple[str, ...] = ()
    grades: tuple[str, ...] = ()
    finishes: tuple[str, ...] = ()
    for pattern, wish in _WORDS:
        if re.search(pattern, text):
            backgrounds, grades, finishes = wish.backgrounds or backgrounds, wish.grades or grades, wish.finishes or finishes
    for colour, names in _COLOURS.items():
        before = rf"(?<![a-z])(?:{names})[ -]?(?:[a-z]{{1,12}} ){{0,2}}(?:{_PLACE})"
        after = rf"(?:{_PLACE})(?: (?:in|is|of)|:)? ?(?:{names})(?![a-z])"
        if re.search(before, text) or re.search(after, text):
            backgrounds = tuple(name for name, scene in SCENES.items() if scene.colour == colour)
            grades = grades or _TRUE_COLOURS  # a duotone would paint the wished colour over
    return Wish(backgrounds, grades, finishes)


def check_table() -> list[str]:
    """Names in the table and the word list that no module knows; empty when all is well."""
    wishes = [wish for _, wish in _WORDS]
    rows = [row for family in _FAMILIES for row in family]
    used = (
        ({row[0] for row in rows} | {name for wish in wishes for name in wish.backgrounds}, {*SCENES, ORIGINAL}),
        ({row[1] for row in rows} | {name for wish in wishes for name in wish.grades}, set(GRADES)),
        ({row[2] for row in rows} | {name for wish in wishes for name in wish.finishes}, set(FINISHES)),
    )
    return sorted(name for names, known in used for name in names - known)
