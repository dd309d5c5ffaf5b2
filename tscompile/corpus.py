# ruff: noqa: RUF001  (characters that look alike are the point)
"""The texts, token ids and chats on which a compiled tokenizer and template must agree with their
references. The same list every time: what is random is seeded."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PROSE = (
    "The quick brown fox jumps over the lazy dog. It's 5 o'clock; we'll've gone, I'D say, DON'T you?",
    "Portez ce vieux whisky au juge blond qui fume, n'est-ce pas\u202f? «\u00a0Voilà\u00a0!\u00a0»",
    "Falsches Üben von Xylophonmusik quält jeden größeren Zwerg. STRASSE, Straße, STRAẞE.",
    "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia y frío; ¿añoraba a su querido cachorro?",
    "Pchnąć w tę łódź jeża lub ośm skrzyń fig. Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Чуєш їх, доцю, га?",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Οδυσσεύς, ΟΔΥΣΣΕΎΣ.",
    "Pijamalı hasta yağız şoföre çabucak güvendi. İstanbul, ISPARTA, ığdır.",
    "דג סקרן שט בים מאוכזב ולפתע מצא לו חברה. שָׁלוֹם",
    "صِف خَلقَ خَودِ كَمِثلِ الشَمسِ إِذ بَزَغَت — يَحظى الضَجيعُ بِها. ۱۲۳۴ ١٢٣٤",
    "بر آن سرم که به کوی تو جان سپارم\u200c، می\u200cروم.",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश। १२३ क्षत्रिय",
    "আমার সোনার বাংলা, আমি তোমায় ভালোবাসি। ১২৩",
    "யாமறிந்த மொழிகளிலே தமிழ்மொழி போல் இனிதாவது எங்கும் காணோம்.",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน ๑๒๓",
    "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。１２３ＡＢＣ　全角",
    "いろはにほへと ちりぬるを。ｶﾀｶﾅ カタカナ が が 漢字かな交じり文、改行\nあり。",
    "다람쥐 헌 쳇바퀴에 타고파. ㄱㄴㄷ 한글 한글",
    "Chó sói nhìn quạ kêu giữa trời; Tiếng Việt có dấu: ặ ẵ ỗ ử ỵ, và ấ ế.",
    "ქართული ენა; Հայոց լեզու; አማርኛ; ខ្មែរ; မြန်မာ; བོད་ཡིག; ᚠᛇᚻ; 𐌰𐌱𐌲; 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚",
    "Math: ∀ε>0 ∃δ>0: |x−a|<δ ⇒ |f(x)−f(a)|<ε; ∑_{i=0}^{n} i² = n(n+1)(2n+1)/6, 10⁻³ ½ Ⅷ ②",
    "Prices: $1,234.56, €99.90, ¥12345678, 3.14159265358979, 0x1F, 1e-10, 1_000_000, 2024-02-30T23:59:60Z.",
    "Mail a.b+c@example.org or see https://example.org/a%20b?q=1&r=%C3%A9#top -- [x](y), <b>b</b>",
    "\"Quotes\" 'single' “curly” ‘inner’ „low“ ‹a› … – — ‐ ‑ ― !!! ??? !?!? ... ,,, ((([[[{{{}}}]]])))",
)
EMOJI = (
    "😀 😃😄 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇺🇳🇫🇷 1️⃣ ❤️ ☺ 🫠 👨🏿‍🚀 text😀text",
    "🤷🏻‍♀️🧑‍🤝‍🧑‍ ‍‍ \ufe0f\u20e3 🇦 🇦🇧🇨",
)
CODE = (
    "def f(x: int) -> int:\n\treturn x ** 2  # squared\n\n\nclass A(B):\n    pass\r\n",
    "for (int i = 0; i < n; ++i) {\n        a[i] += b[i] * (c ? 1 : -1);\n}\n\n\n",
    'let s = format!("{:>8.3}", x); // => "   3.142"\nfn main() -> Result<(), Box<dyn Error>> { Ok(()) }',
    "SELECT * FROM \"t\" WHERE a <> 'b''c' AND d IS NOT NULL;\n-- comment\n",
    '{"key": [1, 2.5e-3, null, true, "\\u00e9\\n"], "": {}}',
    "<!DOCTYPE html>\n<html lang='en'><body>&nbsp;<p class=\"x\">Hi</p></body></html>",
    "$ ls -la | grep '^d' && echo \"done\" > /dev/null 2>&1; export PATH=$HOME/bin:$PATH\n",
    "camelCase PascalCase snake_case SCREAMING_CASE kebab-case x86_64 utf8mb4 i18n __init__ $var @deco #",
)
ODD = (
    "",
    " ",
    "\n",
    "\r\n",
    "\t",
    "a",
    " a",
    "a ",
    "  a  b   c    d",
    "\n\n\na\n \n  \n",
    " \r\n\t\v\f\x1c\x85\u00a0\u1680\u2000\u2003\u2028\u2029\u202f\u205f\u3000\ufeff x",
    "\x00\x01\x07\x1b[31m\x7f\x80\x9f",
    "\u00ad\u200b\u200c\u200d\u200e\u2060\ufffd\ufffe\uffff",
    "e\u0301 é \u0041\u030a Å \ufb01 fi \u1e9b\u0323 \u0958 \uac00 \u1100\u1161",
    "▁ ▁▁a ▁b <0x0A> <0xE2> <unk> <s> </s> <|x|> [UNK] [INST] <<SYS>>",
    "a" * 1000,
    " " * 500 + "x",
    "\n" * 300,
    "ab" * 700,
    "0123456789" * 60,
    "é" * 300 + "😀" * 100,
    "!" * 400,
)

# Where random characters come from: first and last code point, and how often.
RANGES = (
    (0x20, 0x7E, 30),
    (0x00, 0x1F, 3),
    (0x80, 0x24F, 10),
    (0x250, 0x36F, 4),
    (0x370, 0x5FF, 8),
    (0x600, 0x6FF, 6),
    (0x700, 0x1FFF, 10),
    (0x2000, 0x2BFF, 10),
    (0x3000, 0x30FF, 5),
    (0x3400, 0x9FFF, 8),
    (0xAC00, 0xD7A3, 4),
    (0xE000, 0xFFFF, 4),
    (0x10000, 0x1FFFF, 10),
    (0x20000, 0x10FFFF, 3),
)


def texts(added: Sequence[str] = (), *, num_random: int = 2000, seed: int = 1) -> list[str]:
    """A few thousand texts. added: the tokenizer's added tokens, which are put in all sorts of company."""
    rng = random.Random(seed)
    result = [*ODD, *PROSE, *EMOJI, *CODE, *_own_sources()]
    samples = [*PROSE, *EMOJI, *CODE]
    result += [sample.upper() for sample in PROSE] + [sample[::-1] for sample in samples]
    result += [_piece(rng.choice(samples), rng) for _ in range(400)]
    result += [_spaces(rng) for _ in range(200)]
    result += [_random_text(rng) for _ in range(num_random)]
    return result + list(_around(added, rng))


def _own_sources() -> list[str]:
    """Our own sources: Python as people write it, a file a text, and by paragraph."""
    files = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return files + [part for file in files for part in file.split("\n\n\n")]


def _piece(text: str, rng: random.Random) -> str:
    start = rng.randrange(len(text))
    return text[start : start + rng.randrange(1, 40)]


def _spaces(rng: random.Random) -> str:
    """Words between runs of all kinds of white space."""
    space, word = (
        " \n\t\r\u00a0\u3000\u2028",
        ("a", "B", "'s", "1", "12345", ".", "...", "é", "漢", "😀", "_", "\u0301"),
    )
    parts = (
        "".join(rng.choices(space, weights=(8, 4, 2, 1, 1, 1, 1), k=rng.randrange(5))) + rng.choice(word)
        for _ in range(8)
    )
    return "".join(parts) + " " * rng.randrange(3)


def _random_text(rng: random.Random) -> str:
    """1 to 40 characters: of one range, or of all."""
    weights = [weight for _, _, weight in RANGES]
    ranges = rng.choices(RANGES, weights, k=1) if rng.random() < 0.5 else RANGES
    chosen = rng.choices(ranges, [weight for _, _, weight in ranges], k=rng.randrange(1, 41))
    points = (rng.randint(first, last) for first, last, _ in chosen)
    return "".join(chr(point) for point in points if not 0xD800 <= point <= 0xDFFF)


def _around(added: Sequence[str], rng: random.Random) -> Iterator[str]:
    """Each added token (at most 300 of them) alone, in text, among spaces, cut, doubled, in other case; and
    random mixtures."""
    tokens = list(added)
    tokens = tokens if len(tokens) <= 300 else rng.sample(tokens, 300)
    for token in tokens:
        yield from (
            token,
            f"a{token}b",
            f" {token} ",
            f"\n{token}\n\n",
            f"é{token}{token}漢",
            f"{token}\u0301",
        )
        yield from (token[:-1], token[1:], token.upper(), token.lower(), token.replace("<", "< "))
    for _ in range(200 if tokens else 0):
        yield "".join(
            rng.choice((rng.choice(tokens), _piece(rng.choice(PROSE), rng), " ", "\n")) for _ in range(8)
        )


def id_lists(vocab_size: int, *, count: int = 1000, seed: int = 2) -> list[list[int]]:
    """Ids that no text gives: sequences of any tokens, so bytes that are no UTF-8."""
    rng = random.Random(seed)
    low = min(vocab_size, 1000)  # where bytes and special tokens mostly lie
    ends = [vocab_size if rng.random() < 0.5 else low for _ in range(count)]
    return [[], *([rng.randrange(end) for _ in range(rng.randrange(1, 30))] for end in ends)]


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


SYSTEM = said("system", "You are terse.\nAnswer in one line.")
ASK, ANSWER = said("user", "What is 2 + 2?  "), said("assistant", " It is 4.\n")
SCRIPTS = said("user", " 漢字 😀 é <b>&amp;</b> \"quoted\" 'single' {{ 7 * 7 }} {% raw %} \\n\n")
THOUGHT = said("assistant", "<think>\nTwo and two.\n</think>\n\nFour.", reasoning_content="Two and two.")
ARGUMENTS = {"city": "Zürich", "days": 3, "units": ["C", None, True, 0.5]}
FUNCTION = {"name": "weather", "arguments": ARGUMENTS}
CALL = said("assistant", "", tool_calls=[{"id": "call00001", "type": "function", "function": FUNCTION}])
RESULT = said("tool", '{"sky": "grey", "°C": [7, 8]}', name="weather", tool_call_id="call00001")
PROPERTIES = {
    "city": {"type": "string", "description": "Where, e.g. <Zürich>"},
    "days": {"type": "integer", "minimum": 1, "enum": [1, 3]},
}
PARAMETERS = {"type": "object", "properties": PROPERTIES, "required": ["city"]}
WEATHER = {"name": "weather", "description": "Tells it's raining.", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": function} for function in (WEATHER, {"name": "now"})]
CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [ASK],
    [SYSTEM, ASK],
    [ASK, ANSWER, SCRIPTS],
    [SYSTEM, ASK, ANSWER, ASK, THOUGHT, SCRIPTS],
    [said("user", "")],
    [said("user", [{"type": "text", "text": "parts"}])],
    [ASK, CALL, RESULT],
    [SYSTEM, ASK, CALL, RESULT, ANSWER, ASK],
    [ASK, ASK],
    [ANSWER],
    [],
)


def chats() -> list[dict[str, Any]]:
    """Conversations as `tsruntime text render` takes them, with and without tools and the answer's start."""

    def chat(messages: Any, tools: Any, prompt: bool, **kwargs: Any) -> dict[str, Any]:
        return {"messages": messages, "tools": tools, "add_generation_prompt": prompt, "kwargs": kwargs}

    made = []
    for messages in CONVERSATIONS:
        made += [chat(messages, tools, p) for tools in (None, TOOLS[:1], TOOLS) for p in (False, True)]
        made.append(chat(messages, None, True, enable_thinking=False))
    return made
