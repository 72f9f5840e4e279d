"""Says in varied English what a scene shows, and splits English into the embedded model's tokens."""

import random
import re
from itertools import chain
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mlx_wan.training.world import Scene, SceneObject, sample_scene

NAMES_BACKGROUND = 0.85  # share of captions that name the background
NAMES_SIZE = 0.55  # share of captions that name sizes
_LIKE_CANONICAL = 0.15  # share of captions in the plainest form

_COLOUR_WORDS = {
    "purple": ("purple", "purple", "violet"),
    "gray": ("gray", "grey"),
    "navy": ("navy", "navy blue", "dark blue"),
}
_SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}
_SHAPE_WORDS = {
    "circle": ("circle",) * 5 + ("disk", "disc", "dot", "ball"),
    "square": ("square",) * 8 + ("box",),
    "ring": ("ring",) * 8 + ("hoop",),
    "cross": ("cross",) * 6 + ("plus sign", "plus"),
}
_GO = (("moves", "moving"),) * 5 + (
    ("slides", "sliding"),
    ("drifts", "drifting"),
    ("glides", "gliding"),
    ("travels", "travelling"),
    ("goes", "going"),
    ("floats", "floating"),
    ("flies", "flying"),
)
_TOWARDS = {
    "left": ("left", "left", "to the left", "to the left", "leftwards", "leftward", "towards the left",
             "from right to left", "from the right to the left"),
    "right": ("right", "right", "to the right", "to the right", "rightwards", "rightward", "towards the right",
              "from left to right", "from the left to the right"),
    "up": ("up", "up", "upwards", "upward", "to the top", "towards the top", "from bottom to top",
           "from the bottom to the top"),
    "down": ("down", "down", "downwards", "downward", "to the bottom", "towards the bottom", "from top to bottom",
             "from the top to the bottom"),
}  # fmt: skip
# Verb phrases as (third person, participle); the first of each is the canonical one.
_VERBS: dict[str, tuple[tuple[str, str], ...]] = {
    "left": (),
    "right": (),
    "up": (("rises", "rising"), ("climbs up", "climbing up"), ("ascends", "ascending")),
    "down": (("falls", "falling"), ("falls down", "falling down"), ("sinks", "sinking"), ("descends", "descending")),
    "still": (("stays still", "staying still"), ("stands still", "standing still"), ("does not move", "not moving"),
              ("remains still", "remaining still"), ("stays in place", "staying in place"),
              ("rests", "resting"), ("remains motionless", "remaining motionless"),
              ("sits still", "sitting still")),
    "orbit": (("orbits", "orbiting"), ("orbits around the center", "orbiting around the center"),
              ("orbits around the centre", "orbiting around the centre"), ("moves in a circle", "moving in a circle"),
              ("moves in circles", "moving in circles"), ("goes around in a circle", "going around in a circle"),
              ("circles around", "circling around"), ("travels around a circle", "travelling around a circle"),
              ("revolves around the center", "revolving around the center")),
    "bounce": (("bounces", "bouncing"), ("bounces up and down", "bouncing up and down"),
               ("bounces on the ground", "bouncing on the ground"), ("bounces on the floor", "bouncing on the floor"),
               ("keeps bouncing", "bouncing"), ("hops up and down", "hopping up and down")),
    "grow": (("grows", "growing"), ("grows larger", "growing larger"), ("grows bigger", "growing bigger"),
             ("gets bigger", "getting bigger"), ("gets larger", "getting larger"), ("expands", "expanding"),
             ("becomes bigger", "becoming bigger"), ("increases in size", "increasing in size")),
    "shrink": (("shrinks", "shrinking"), ("gets smaller", "getting smaller"), ("becomes smaller", "becoming smaller"),
               ("contracts", "contracting"),
               ("decreases in size", "decreasing in size")),
}  # fmt: skip

# How one object's clause is built: {n} noun phrase, {v} third person, {g} participle.
_SENTENCES = ("{n} {v}",) * 6 + ("{n} {g}",) * 4 + ("{n} is {g}", "{n} that {v}")
_NOMINALS = ("{n} {g}",) * 3 + ("{n} that {v}",)  # what can follow "a video of"
_PAIRS = ("{0} and {1}",) * 5 + ("{0} while {1}", "{0}, and {1}", "{0}, {1}")
_PREFIXES = ("there is ", "there is ", "a video of ", "a video of ", "a clip of ", "an animation of ",
             "an animated video of ", "a video showing ", "video of ")  # fmt: skip
_BEHIND = (" on a {b} background",) * 8 + (
    " against a {b} background",
    " over a {b} background",
    " in front of a {b} background",
    " with a {b} background",
    " on {b}",
    ", {b} background",
    ", the background is {b}",
    " on the {b} background",
)
_AHEAD = ("on a {b} background, ",) * 4 + ("against a {b} background, ", "over a {b} background, ", "{b} background, ")


def caption(scene: Scene, rng: random.Random) -> str:
    """One of the many ways to describe the scene. Each object's colour, shape and motion are always named; sizes
    and the background often (NAMES_SIZE, NAMES_BACKGROUND)."""
    if rng.random() < _LIKE_CANONICAL:
        return _finish(canonical_caption(scene, sizes=rng.random() < NAMES_SIZE), rng)
    sizes = rng.random() < NAMES_SIZE
    articles = rng.random() < 0.92
    prefix = rng.choice(_PREFIXES) if rng.random() < 0.2 else ""
    form = rng.choice(_NOMINALS if prefix else _SENTENCES)
    clauses = [_clause(each, form, rng, sizes, articles) for each in scene.objects]
    text = prefix + (rng.choice(_PAIRS).format(*clauses) if len(clauses) == 2 else clauses[0])
    if rng.random() < NAMES_BACKGROUND:
        back = rng.choice(_COLOUR_WORDS.get(scene.background, (scene.background,)))
        behind = rng.random() < 0.7
        text = text + rng.choice(_BEHIND).format(b=back) if behind else rng.choice(_AHEAD).format(b=back) + text
    return _finish(text, rng)


def canonical_caption(scene: Scene, sizes: bool = False) -> str:
    """The plainest caption: "a red circle moves right on a black background"."""
    said = []
    for each in scene.objects:
        size = f"{each.size} " if sizes and each.size else ""
        verb = f"moves {each.motion}" if each.motion in _TOWARDS else _VERBS[each.motion][0][0]
        said.append(f"{_article(size + each.colour)} {size}{each.colour} {each.shape} {verb}")
    return f"{' and '.join(said)} on {_article(scene.background)} {scene.background} background"


def _clause(each: SceneObject, form: str, rng: random.Random, sizes: bool, articles: bool) -> str:
    """Say what one object does, in the given form."""
    words = [rng.choice(_SIZE_WORDS[each.size])] if sizes and each.size else []
    words.append(rng.choice(_COLOUR_WORDS.get(each.colour, (each.colour,))))
    words.append(rng.choice(_SHAPE_WORDS.get(each.shape, (each.shape,))))
    noun = " ".join(words)
    if articles:
        noun = f"{_article(noun)} {noun}"
    third, participle = _verb(each.motion, rng)
    return form.format(n=noun, v=third, g=participle)


def _verb(motion: str, rng: random.Random) -> tuple[str, str]:
    verbs = _VERBS[motion]
    if motion in _TOWARDS and (not verbs or rng.random() < 0.8):
        go, where = rng.choice(_GO), rng.choice(_TOWARDS[motion])
        return f"{go[0]} {where}", f"{go[1]} {where}"
    return rng.choice(verbs)


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def _finish(text: str, rng: random.Random) -> str:
    """Lower case or a capital, with or without a full stop."""
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.3 else text


def names_background(text: str, scene: Scene) -> bool:
    """Whether a caption of the scene names its background."""
    return any(word in text.lower() for word in _COLOUR_WORDS.get(scene.background, (scene.background,)))


def heldout_prompts(n: int = 200, seed: int = 0) -> list[tuple[str, Scene]]:
    """n (prompt, scene) pairs whose (colour, shape, motion) triples training never shows: three in four with one
    object, the rest with two. Deterministic in seed."""
    rng = random.Random(seed)
    found = []
    for i in range(n):
        scene = sample_scene(rng, held_out=True, count=2 if i % 4 == 3 else 1)
        found.append((caption(scene, rng), scene))
    return found


# ---- tokens ------------------------------------------------------------------------------------------------

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2 as in UMT5

# Words that captions do not use but people do; their embeddings stay untrained, which is better than spelling.
_OTHER_WORDS = """
about above across after again all along also always am another any are area around at away back be become
been before behind below beside between bit blank both bottom but by camera can clear clip colored coloured
colour color colors colours come comes continuously corner dark directly distance do double each edge eight
empty ever every everything fast few figure film five flat footage for four frame frames full go gradually
half has have he her here high his horizontally how i if image in inside into it its just keep kind larger
last light like line long look looping low made make many middle minimal more most motion move movement much
my near nine no nothing now of off one only onto or other our out outside over pale part past path picture
plain point position quickly quietly quite rapidly rectangle repeatedly round same scene screen second see
seven shape shapes she short show shows side simple single six slow slowly small smooth smoothly so solid
some something space speed spin spins start starts steadily step still stop stops straight style such
swiftly ten than their then these they thing this those three through time times together too toward two
under until upper us very vertically video view was we well were what when where which white who whole wide
will with without you your zoom
"""


def caption_words() -> list[str]:
    """Every word a caption can hold, sorted."""
    verbs = chain.from_iterable(chain.from_iterable(_VERBS.values()))
    texts = chain(
        verbs, chain.from_iterable(_GO), *_TOWARDS.values(), *_COLOUR_WORDS.values(), *_SIZE_WORDS.values(),
        *_SHAPE_WORDS.values(), _SENTENCES, _NOMINALS, _PAIRS, _PREFIXES, _BEHIND, _AHEAD,
        ("a", "an", "triangle", "star", "red", "green", "blue", "yellow", "orange", "cyan", "pink", "black", "white",
         "brown", "beige"),
    )  # fmt: skip
    return sorted(set(re.findall(r"[a-z]+", re.sub(r"\{.\}", " ", " ".join(texts)))))


def build_tokenizer() -> Tokenizer:
    """The embedded model's tokenizer: a word a token, unknown words spelled letter by letter, then </s>.

    Nothing is trained: the vocabulary is written out in a fixed order, so the same code gives the same file. Text
    is lowercased and stripped of accents; a character outside printable ASCII makes its word <unk>.
    """
    words = caption_words()
    others = sorted(set(_OTHER_WORDS.split()) - set(words))
    marks = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    tails = ["##" + c for c in marks if c.isalnum()]
    endings = ["##s", "##ed", "##ing", "##er", "##ly", "##ish"]
    tokens = dict.fromkeys([PAD, EOS, UNK, *words, *others, *marks, *tails, *endings])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNK, max_input_chars_per_word=64))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^\p{L}\p{N}]"), "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, vocabulary[EOS])]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens([PAD, EOS, UNK])
    return tokenizer


def write_tokenizer(path: Path) -> None:
    """Write tokenizer.json whole."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_text(build_tokenizer().to_str(pretty=True) + "\n", encoding="utf-8")
    part.replace(path)
