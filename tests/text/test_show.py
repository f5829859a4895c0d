"""Laws of the coloured tokens: who has which colour, that letters can be read, and that no text becomes markup."""

import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from moe_jax.text.colours import INK, NOBODY, Traced, as_html, letters, on_terminal, palette, shares, top_experts

EXPERTS = 3
# two layers, three tokens, two slots; the last token has no expert in layer 1, the second one slot only
IDS = np.array([[[0, 2], [1, 2], [2, 0]], [[1, 0], [2, 3], [3, 3]]])
GATES = np.array([[[0.3, 0.7], [0.5, 0.5], [0.9, 0.1]], [[0.8, 0.2], [1.0, 0.0], [0.0, 0.0]]])
TEXT = Traced([5, 6, 7], [b"<script>", b'"&', b"\n"], 1, IDS, GATES)


class Page(HTMLParser):
    """The tags of a page with their attributes, and the text in them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def tokens(page):
    return [attrs for tag, attrs in page.tags if tag == "span" and "title" in attrs]


def test_the_top_expert_has_the_largest_gate_and_of_equal_ones_comes_first():
    assert top_experts(TEXT, EXPERTS).tolist() == [[2, 1, 2], [1, 2, -1]]


def test_shares_are_of_all_copies_empty_slots_left_out():
    # layer 0 has six copies: 2, 1 and 3; layer 1 three: 1 each
    np.testing.assert_allclose(shares([TEXT], EXPERTS), [[1 / 3, 1 / 6, 1 / 2], [1 / 3, 1 / 3, 1 / 3]])


def test_a_character_of_several_tokens_stands_at_its_last():
    assert letters([b"a", "é".encode()[:1], "é".encode()[1:], b"\xff", b"b"]) == ["a", "▏", "é", "�", "b"]


def test_text_cannot_command_the_terminal():
    assert letters([b"\x1b[31m", b"\r", b"\x07", b"\t\n", "\x9b".encode()]) == ["�[31m", "�", "�", "\t\n", "�"]


# --- colours ----------------------------------------------------------------------------------------------------


def luminance(color):
    values = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values)
    return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("num_experts", [1, 2, 8, 16, 64, 256])
def test_every_expert_has_a_color_of_its_own_on_which_letters_can_be_read(num_experts):
    colors = palette(num_experts)
    assert len(set(colors)) == num_experts and NOBODY not in colors
    for color in [*colors, NOBODY]:  # WCAG's 4.5 : 1
        assert (luminance(color) + 0.05) / (luminance(INK) + 0.05) > 4.5


def test_colors_of_few_experts_are_far_apart():
    points = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in palette(16)], float)
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1) + 1e9 * np.eye(16)
    assert distances.min() > 25


def test_a_color_is_that_of_the_formula():
    # white has lightness 1 and no chroma; the red of sRGB is oklch(0.628 0.2577 29.23)
    from moe_jax.text.colours import oklch

    assert oklch(1.0, 0.0, 0.0) == "#ffffff"
    assert oklch(0.62796, 0.25768, 29.234) == "#ff0000"


# --- the terminal -----------------------------------------------------------------------------------------------


def test_the_terminal_has_the_text_in_the_colors_of_the_layer():
    text, legend = on_terminal([TEXT], 0, EXPERTS)
    assert text.plain == '<script>"&↵\n'
    colors = palette(EXPERTS)
    assert [str(span.style) for span in text.spans] == [
        f"italic {INK} on {colors[2]}",
        f"{INK} on {colors[1]}",
        f"{INK} on {colors[2]}",
    ]
    assert re.search(r" 2 +50% +0 +33% +1 +17%", legend.plain)


def test_brackets_are_no_markup_of_the_terminal():
    bracket = Traced([1], [b"[bold]x[/]"], 0, IDS[:, :1], GATES[:, :1])
    console = Console(file=io.StringIO(), width=80)
    console.print(on_terminal([bracket], 0, EXPERTS)[0])
    assert console.file.getvalue() == "[bold]x[/]\n"


def test_tokens_without_text_are_not_shown():
    separated = TEXT._replace(pieces=[b"", b"a", b"b"])
    assert on_terminal([separated], 0, EXPERTS)[0].plain == "ab"
    page = as_html([separated], 0, EXPERTS, "t")
    assert len(tokens(Page(page))) == 2
    assert data_of(page)["top"] == [[1, 2], [2, -1]]


# --- HTML -------------------------------------------------------------------------------------------------------


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*)</script>', page)[1])


def test_text_is_escaped():
    text = as_html([TEXT], 0, EXPERTS, "<script>alert(1)</script>")
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 2  # the data and ours
    assert '<script>"&\n' in "".join(page.text)
    assert "b'\"&'" in tokens(page)[1]["title"]
    assert "alert(1)</script>" not in text


def test_a_page_needs_no_network_and_allows_none():
    page = Page(as_html([TEXT], 0, EXPERTS, "t"))
    assert not any(name in ("src", "href") for _, attrs in page.tags for name in attrs)
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy


def test_a_title_tells_experts_and_gates_of_all_layers_by_falling_gate():
    title = tokens(Page(as_html([TEXT], 0, EXPERTS, "t")))
    assert title[0]["title"] == "token 5 b'<script>'\nlayer 0: 2 (0.700), 0 (0.300)\nlayer 1: 1 (0.800), 0 (0.200)"
    assert title[2]["title"].endswith("layer 1: no expert")


def test_a_page_begins_with_the_layer_asked_for_and_holds_all():
    for layer in (0, 1):
        text = as_html([TEXT, TEXT], layer, EXPERTS, "t")
        tops = top_experts(TEXT, EXPERTS)
        colors = [*palette(EXPERTS), NOBODY]
        styles = [attrs["style"] for attrs in tokens(Page(text))]
        assert styles == [f"background:{colors[top]}" for top in tops[layer]] * 2
        selected = [attrs["value"] for tag, attrs in Page(text).tags if tag == "option" and "selected" in attrs]
        assert selected == [str(layer)]
        assert data_of(text)["top"] == np.concatenate([tops, tops], 1).tolist()


def test_the_prompt_is_marked():
    classes = [attrs["class"].split() for attrs in tokens(Page(as_html([TEXT], 0, EXPERTS, "t")))]
    assert classes == [["given"], [], ["line"]]
