"""Captions say what is in the scene, in words that the tokenizer knows."""

import random
import re

from mlx_wan.training.captions import build_tokenizer, canonical_caption, caption, heldout_prompts, write_tokenizer
from mlx_wan.training.world import Scene, SceneObject, is_held_out, is_held_out_triple, sample_scene

RIGHT = Scene("black", (SceneObject("red", "circle", "large", "right", 0.3, 0.5, 0.16, 0.4),))

# One pattern a motion, written apart from the captions' own tables.
SAYS = {
    "left": r"\bleft\b(?! to)|leftwards?",
    "right": r"\bright\b(?! to)|rightwards?",
    "up": r"\bup\b|upwards?|\btop\b|ris(es|ing)|ascend",
    "down": r"\bdown\b|downwards?|\bbottom\b|falls|falling|sink|descend",
    "still": r"still|motionless|in place|not mov|rest(s|ing)",
    "orbit": r"orbit|in a circle|in circles|circl(es|ing) around|around a circle|revolv",
    "bounce": r"bounc|hop(s|ping) up and down",
    "grow": r"grow|bigger|larger|expand|increas",
    "shrink": r"shrink|smaller|contract|decreas",
}
SHAPE_SAYS = {"circle": r"circle|dis[ck]|dot|ball", "square": "square|box", "ring": "ring|hoop", "cross": "cross|plus"}


def many(n: int, seed: int = 0, **options) -> list[tuple[str, Scene]]:
    rng = random.Random(seed)
    return [(caption(scene, rng), scene) for scene in (sample_scene(rng, **options) for _ in range(n))]


def test_the_plainest_caption():
    assert canonical_caption(RIGHT) == "a red circle moves right on a black background"
    assert canonical_caption(RIGHT, sizes=True) == "a large red circle moves right on a black background"
    rng = random.Random(0)
    assert "a red circle moves right on a black background" in {caption(RIGHT, rng) for _ in range(300)}


def test_colour_shape_and_motion_are_always_named():
    for text, scene in many(4000, held_out=None):
        for each in scene.objects:
            text_low = text.lower()
            assert re.search(each.colour if each.colour != "purple" else "purple|violet", text_low), (text, scene)
            assert re.search(SHAPE_SAYS.get(each.shape, each.shape), text_low), (text, scene)
            assert re.search(SAYS[each.motion], text_low), (text, scene)


def test_nothing_false_is_said():
    """A one-object caption names no other colour, direction or size than the scene's."""
    colours = {"red", "green", "blue", "yellow", "orange", "purple", "cyan", "pink"}
    for text, scene in many(
        3000,
        seed=1,
        held_out=None,
    ):
        if len(scene.objects) == 2:
            continue
        each = scene.objects[0]
        words = set(re.findall(r"[a-z]+", text.lower()))
        other = colours - {each.colour} - ({"blue"} if scene.background == "navy" else set())
        assert not words & other, text
        if each.size != "small":
            assert not words & {"small", "little", "tiny"}, text
        if each.size != "large":
            assert not words & {"large", "big", "huge"}, text
        backgrounds = {"black", "white", "gray", "grey", "navy", "brown", "beige"} - {scene.background}
        assert not words & (backgrounds - ({"grey"} if scene.background == "gray" else set())), text


def test_captions_vary():
    texts = [caption(RIGHT, random.Random(i)) for i in range(1000)]
    assert len(set(texts)) > 500
    assert 0.75 < sum("black" in t.lower() for t in texts) / 1000 < 0.95
    assert 0.40 < sum(bool(re.search("large|big|huge", t.lower())) for t in texts) / 1000 < 0.70
    assert 0.2 < sum(t.endswith(".") for t in texts) / 1000 < 0.4
    assert 0.2 < sum(t[0].isupper() for t in texts) / 1000 < 0.4


def test_articles_fit():
    for text, _ in many(2000, seed=2):
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text.lower()), text


def test_heldout_prompts_are_held_out_fixed_and_mostly_single():
    prompts = heldout_prompts(200, seed=0)
    assert len(prompts) == 200
    assert prompts == heldout_prompts(200, seed=0) != heldout_prompts(200, seed=1)
    assert all(is_held_out_triple(o.colour, o.shape, o.motion) for _, s in prompts for o in s.objects)
    assert all(is_held_out(scene) for _, scene in prompts)
    assert sum(len(s.objects) == 1 for _, s in prompts) == 150
    motions = [o.motion for _, s in prompts for o in s.objects]
    assert min(motions.count(m) for m in SAYS) >= 10


def test_tokenizer_knows_every_caption_word_as_one_token():
    tokenizer = build_tokenizer()
    for text, _ in many(2000, seed=3, held_out=None):
        encoding = tokenizer.encode(text)
        assert encoding.tokens[-1] == "</s>"
        assert 2 not in encoding.ids
        assert 0 not in encoding.ids
        assert len(encoding.ids) == len(re.findall(r"[a-z]+|[.,]", text.lower())) + 1
        assert tokenizer.decode(encoding.ids).replace(" ", "") == text.lower().replace(" ", "")


def test_tokenizer_ids_and_folding():
    tokenizer = build_tokenizer()
    assert [tokenizer.token_to_id(t) for t in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    assert 256 < tokenizer.get_vocab_size() < 1024
    assert tokenizer.encode("A RED Circle").ids == tokenizer.encode("a red circle").ids
    assert tokenizer.encode("").ids == [1]


def test_words_outside_are_spelled_or_unknown():
    tokenizer = build_tokenizer()
    assert tokenizer.encode("zq").tokens == ["z", "##q", "</s>"]
    assert tokenizer.encode("红色 ☃ 圆").ids == [2, 2, 2, 1]
    assert len(tokenizer.encode("x" * 1000 + " red, (square)! 42%").ids) > 5


def test_tokenizer_file_is_the_same_each_time(tmp_path):
    for name in ("one.json", "two.json"):
        write_tokenizer(tmp_path / name)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.json", "two.json"]
