"""Telling the language of a text: polyglot's detector, helped where a text is short.

The detector compares runs of four letters. A question of forty characters has too few of them: it
calls one in seven Spanish ones English or Guarani. So for short texts three more things count: the
common words of a language, its alphabet, and that chats are mostly in a few languages.
"""

import re
from collections import Counter, defaultdict
from functools import cache

from icu import LocaleData
from polyglot.detect import base

from llama_lora.corpus.language import UNKNOWN

FEW = 8  # letters; for fewer, there is only the detector's word
ENOUGH = 100  # characters; from here on, a reliable answer of the detector is taken

# In the unit of the detector's scores; a window of forty letters scores about 20.
COMMON_WORD, FOREIGN_LETTERS = 6.0, 12.0

HINTS = "en,es,pt", "de,fr,it,nl"  # the detector heeds the last four for a script, hence two lists
CYRILLIC_LANGUAGES = "ru", "uk", "bg", "sr"
CHINESE = "zh", "zh_Hant"

COMMON_WORDS = {
    "en": (
        "the of and to in is that it for was on are as with be at by this have from or an not you "
        "which can will all any has their its no i my how what do does your we there if but"
    ),
    "es": (
        "el la los las de del y que en un una por con para se su sus es al lo no como más o pero "
        "este esta ha son si sin sobre todo todos toda ser tiene hay me mi qué cómo está ni"
    ),
    "fr": (
        "le la les de des du et à que en un une dans est pour par sur au aux qui il elle ce cette "
        "ne pas plus se son sa ses ou avec sont ont être tout je nous vous leur mais qu"
    ),
    "it": (
        "il lo la i gli le di del della dei delle e che in un una per con su si non è a da al "
        "alla nel nella dal ma come sono ha o suo sua più anche se mi ed questo essere cui dell"
    ),
    "pt": (
        "o a os as de do da dos das e que em um uma por com para se seu sua não no na nos ao à às "
        "mais é ou mas como ser são tem foi isso este sem pelo pela eu você meu há ele ela"
    ),
    "de": (
        "der die das und ist in den dem des ein eine einer eines von mit auf für nicht sich auch "
        "an als es im am zum zur oder wird werden sind hat ich wie aus nach wenn dass man"
    ),
    "nl": (
        "de het een en van in is op te dat die voor met zijn niet aan er om ook als door naar bij "
        "of uit zal worden heeft ik je we maar deze dit wordt kan over wat hoe zich hun ieder"
    ),
    "gl": (
        "o a os as de do da dos das e que en un unha por con para se seu súa non no na nos ao á "
        "máis é ou como ser son ten foi isto este sen polo pola eu teu hai todo toda nin"
    ),
    "ca": (
        "el la els les de del dels i que en un una per amb es seu seva no al als més és o però "
        "com ser són té ha aquest aquesta sense sobre tot tota tots a ni què"
    ),
    "ro": (
        "și de la în a al ale cu pe nu un o să este care din pentru sau ca se mai fi sunt prin "
        "lui dreptul orice are ce va sa său fără"
    ),
    "af": (
        "die van en in is dit het nie n om te met vir op sy hy wat sal word deur of aan ek jy ons "
        "hulle se as by alle elkeen tot kan"
    ),
    "da": (
        "og i af at en et den det til er som på for med de ikke har han der skal om eller ved fra "
        "sin sit enhver kan jeg du vi hvad"
    ),
    "sv": (
        "och i att en ett den det som på är av för med till de inte har han om eller vid från sin "
        "sitt var envar skall kan jag du vi vad"
    ),
    "ru": (
        "и в не на что с по это для от к как из он она было его если при мы вы я они также все "
        "или у о за но а так чтобы может быть их мне до же"
    ),
    "uk": (
        "і в у не на що з по це для від до як із він вона було його якщо при ми ви я вони також "
        "всі або та за але а й так щоб може бути їх мені без"
    ),
    "bg": (
        "и в не на че с по това за от до как из той тя беше го ако при ние вие аз те също всички "
        "или у о но а така да може бъде им са се като"
    ),
    "sr": (
        "и у не на што са по то за од до како из он она је било га ако при ми ви ја они све или о "
        "али а тако да може бити их се као су"
    ),
}
NO_CHARACTERS = "".join(
    f"{chr(plane + 0xFFFE)}{chr(plane + 0xFFFF)}" for plane in range(0, 0x110000, 0x10000)
)
NOT_TEXT = re.compile(f"[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef{NO_CHARACTERS}]")
WORD = re.compile(r"[^\W\d_]+")
LATIN = re.compile("[a-z\u00df-\u024f]")
CYRILLIC = re.compile("[\u0400-\u04ff]")
KANA = re.compile("[\u3040-\u30ff\uff66-\uff9f]")


class Guess(base.Detector):
    """polyglot's detector on plain text, in best-effort mode, with hints in favour of some codes.

    `score` is how strongly the text speaks for `code`; polyglot gives it per 1,024 bytes.
    """

    def __init__(self, text: str, hints: str = ""):
        self.hints = hints
        super().__init__(text, quiet=True)

    def detect(self, text: str) -> None:
        self.reliable, _, choices = base.cld2.detect(
            text.encode(), isPlainText=True, bestEffort=True, hintLanguageHTTPHeaders=self.hints
        )
        self.languages = [base.Language(one) for one in choices if one[1] != "un"]
        self.code, self.score = UNKNOWN, 0.0
        if self.languages:
            self.code = self.languages[0].code
            self.score = self.languages[0].read_bytes * len(text) / 1024


def detect(text: str) -> str:
    """The code of the language of `text`, or `UNKNOWN`."""
    try:
        guess = Guess(text)
    except base.cld2.error:  # it reads only valid interchange Unicode
        text = NOT_TEXT.sub(" ", text)
        guess = Guess(text)
    code = guess.code
    if not guess.reliable or len(text) < ENOUGH:
        code = weighed(text, guess)
    if code in CHINESE or code == "ja" and not KANA.search(text):  # Japanese always has kana
        code = chinese(text)
    return code.replace("_", "-")


@cache
def languages_by_word() -> dict[str, list[str]]:
    found = defaultdict(list)
    for name, words in COMMON_WORDS.items():
        for word in words.split():
            found[word].append(name)
    return dict(found)


def weighed(text: str, guess: Guess) -> str:
    """The language that the detector, common words and the alphabet together speak for most."""
    words = WORD.findall(text.lower())
    if sum(map(len, words)) < FEW:
        return guess.code if guess.reliable else UNKNOWN
    known = languages_by_word()
    evidence = Counter(name for word in words for name in known.get(word, ()))
    if mostly(LATIN, words):
        likely = [name for name, _ in evidence.most_common(1)]
        guesses = [guess, *(Guess(text, hints) for hints in (*HINTS, *likely))]
        scores = {}
    elif mostly(CYRILLIC, words):
        guesses = [guess]
        scores = dict.fromkeys(CYRILLIC_LANGUAGES, 0.0)  # hints have no effect on these
    else:
        return guess.code
    for one in guesses:
        scores[one.code] = max(scores.get(one.code, 0.0), one.score)
    scores.pop(UNKNOWN, None)
    for name in scores:
        scores[name] += COMMON_WORD * evidence[name] - FOREIGN_LETTERS * misspelled(words, name)
    return max(scores, key=scores.get, default=UNKNOWN)


def mostly(letter: re.Pattern, words: list[str]) -> bool:
    """Whether most letters of `words` are of one kind."""
    text = "".join(words)
    return len(letter.findall(text)) * 2 > len(text)


def misspelled(words: list[str], name: str) -> int:
    """How many of `words` have letters outside the alphabet of a language."""
    return sum(not alphabet(name).issuperset(word) for word in words)


@cache
def alphabet(name: str) -> set[str]:
    return set("".join(LocaleData(name).getExemplarSet()))


def chinese(text: str) -> str:
    """`zh`, or `zh-Hant` if more of `text` is in the traditional character set."""
    simplified, traditional = (len(text.encode(name, "ignore")) for name in ("gb2312", "big5"))
    return "zh-Hant" if traditional > simplified else "zh"
