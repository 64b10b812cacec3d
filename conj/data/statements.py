"""What a short text states as a whole: that answer 1 is better, that answer 2 is, or that neither is.

Chinese and English. Every word of the text must belong to the statement: a reason, a condition, a negation, a question
or a name of more than one answer makes it none. So it is read only where a judge wrote nothing else.
"""

import functools
import re
import unicodedata
from typing import Literal

Stated = Literal[1, 2, "tie"]

MAX_LENGTH = 120  # characters; nothing longer is a short statement
MARKUP = re.compile(r"[*`#~\"'“”‘’「」『』()\[\]【】]|\\boxed|(?<=boxed)[{}]")
BRACKETS = ("()", "（）", "[]", "【】")  # one alone is of a list: 1) …
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
SENTENCE_END = re.compile(r"(?<=[。.!！;；\n])")
# Of a full match, [①②] is the better answer, [❶❷] the other one; a digit stands for an answer where one is named.
BETTER_ZH = r"(?:(?:更|较|比较|略|稍)(?:为|加)?(?:好|佳|优秀|优|强|合适|出色)(?:一些|一点|些)?|[更略]?胜一筹|胜出|获胜|胜|最好|最佳)"
VERY_ZH = r"(?:明显|显然|确实|总体上?|整体上?|相对|稍微|显著|无疑|质量|的|要|会|是|都)*+"
VERY_EN = r"(?:(?:clearly|slightly|much|definitely|overall|far|somewhat|significantly|a bit|a little|marginally) )*+"
ANSWER_EN = r"(?:answer|response|one|choice|option|reply)"
BEST_EN = "(?:better|best|superior|stronger|preferable|preferred|winning|more suitable)"
BETTER_EN = (
    rf"(?:(?:(?:the )?{VERY_EN}{BEST_EN}(?: {ANSWER_EN})?|a {VERY_EN}{BEST_EN} {ANSWER_EN})(?: of the two)?"
    r"|the winner|my choice|my pick)"
)
SO = (
    r"(?>(?:综上所述|综上|因此|所以|总之|总的来说|总体而言|总体来说|整体来看|综合来看|在我看来|整体而言|两者相比|毫无疑问|最终|最后|我认为|我觉得|我判断|经过比较"
    r"|比较之后|相比之下|显然|很明显|therefore|thus|hence|so|overall|in conclusion|to conclude|in summary|finally|ultimately"
    r"|i think that|i believe that|i think|i believe|i would say|id say|in my opinion|in my judgment|in my view|to me|it is clear that|between the two|clearly|definitely|certainly)[,: ]*)*+"
)
LABEL = (
    r"(?>(?:我的)?(?:最终)?(?:判断结果|评判结果|判断|答|选择|结论|答案|结果)[是为:]+"
    r"|(?:my |the )?(?:final )?(?:verdict|judge?ment|answer|decision|conclusion|(?:correct )?choice|pick|result)(?::| is[: ])+ ?)"
)
SAME_ZH = r"(?:一样好|同样好|一样|相同|差不多好|差不多|不相上下|不分上下|不分高下|难分高下|难分伯仲|难分上下|相当|旗鼓相当|打平|平局|平手|没有明显差别|没有明显区别|没有差别|没有区别)"
SAME_EN = (
    r"(?:equally (?:good|bad)|equal(?: in quality)?|(?:about )?the same|of (?:the same|equal) quality|equivalent|tied)"
)
STATEMENTS = [
    rf"{SO}{LABEL}?([①②]){VERY_ZH}{BETTER_ZH}(?:的(?:回答|答案|一个|那个|选择)?)?",
    rf"{SO}{LABEL}?([①②]){VERY_ZH}略?(?:优于|好于|胜过|强于)([❶❷])",
    rf"{SO}{LABEL}?([①②])比([❶❷])(?:明显|要|更|都|还)*+(?:好|佳|优秀|优|强)(?:一些|一点|些|得多|很多)?",
    rf"{SO}{LABEL}?(?:KEY|(?:更好|较好|更优|更佳|较优|最好|最佳|更优秀|更合适|获胜|胜出)的?(?:回答|答案|一个|那个)?)(?:应该|应当)?[是为:=]+([①②12])",
    rf"{SO}{LABEL}?(?:更好|较好|更优|更佳|最好|最佳)的?([①②])",
    rf"{SO}我?(?:会|更|最终|还是)*+(?:选择|选|支持|推荐|倾向于选择|倾向于|偏向|喜欢)(?:的?是|了)?:?([①②12])",
    rf"{SO}{LABEL}?([①②12]) is {VERY_EN}{BETTER_EN}(?: (?:than|to) ([❶❷]))?(?: overall| here| by far| in every respect| in all respects)?",
    rf"{SO}([①②]) (?:clearly )?(?:wins|(?:outperforms|beats|is preferred over) ([❶❷]))",
    rf"{SO}(?:KEY|{BETTER_EN}|(?:the )?winner)(?::| is[: ]|=| =)+ ?([①②12])",
    rf"{SO}(?:id |i )(?:would |will |do |strongly |slightly |clearly )*+(?:prefer|choose|pick|select|vote for|go with|favou?r|recommend) ([①②12])(?: over ([❶❷]))?",
    rf"(?:{SO}{LABEL})?([①②12])",
]
CLOSED = (
    rf"{SO}(?:是|it is |its )?([①②])"  # where a full stop ends it; without one it may be the beginning of a sentence
)
TIES = [
    rf"{SO}{LABEL}?(?:KEY[是为:=]+|(?:这?两个回答|这?两个答案|两者|二者|它们|①[和与]❷)(?:的?质量)?(?:都|基本|几乎|总体)?)?{SAME_ZH}的?",
    rf"{SO}{LABEL}?(?:KEY(?::| is )+)?(?:its |it is |this is )?(?:a )?(?:tie|draw)",
    rf"{SO}{LABEL}?(?:KEY(?::| is )+)?(?:(?:both|both answers|they|the two answers|the answers|① and (?:❷|2)) are )?{SAME_EN}",
    rf"{SO}{LABEL}?neither(?: {ANSWER_EN})?(?: is better)?",
    rf"{SO}there is no (?:clear |real )?difference(?: between (?:the two|the two answers|them|① and (?:❷|2)))?",
]
WORDS = {"1": 1, "一": 1, "one": 1, "first": 1, "1.0": 1, "2": 2, "二": 2, "two": 2, "second": 2, "2.0": 2}
NUMBERS = {"1": "①", "一": "①", "one": "①", "first": "①", "1st": "①", "former": "①", "前者": "①"}
MAYBE = re.compile(
    r"[12一二１２①②两前后平同样难分相差别]|one|two|first|second|former|latter|tie|draw|equal|neither|both|same|differ",
    re.IGNORECASE,
)


def stated(text: str, answer_name: str, verdict_key: str, maybe_cut: bool = False) -> Stated | None:
    """What the text states. `answer_name`: what an answer is called, beside the usual words; `verdict_key`: the name
    of the verdict. `maybe_cut`: the bare name of an answer may be the beginning of a sentence, and states nothing."""
    if len(text) > 4 * MAX_LENGTH or not MAYBE.search(text):
        return None
    if found := _whole(text, answer_name, verdict_key, maybe_cut):
        return found
    found = {
        _whole(sentence, answer_name, verdict_key, maybe_cut)
        for sentence in SENTENCE_END.split(text)
        if sentence.strip()
    }
    return found.pop() if len(found) == 1 else None


def stated_value(value: str, answer_name: str, verdict_key: str) -> Stated | None:
    """What a text states that stands where a verdict belongs, so that a bare word for a number is one."""
    bare = unicodedata.normalize("NFKC", value[:MAX_LENGTH]).strip(" \t\r\n.。*").casefold()
    return WORDS.get(bare) or stated(value, answer_name, verdict_key)


def _whole(text: str, answer_name: str, verdict_key: str, maybe_cut: bool) -> Stated | None:
    if any(text.count(a) != text.count(b) for a, b in BRACKETS):
        return None
    closed = not text.rstrip()[-1:].isalnum()
    text = _plain(text)
    if not 0 < len(text) <= MAX_LENGTH or any(c in text for c in "?{}<>①②❶❷"):
        return None
    names, statements, ties = _grammar(answer_name, verdict_key)
    text = names.sub(_number, text)
    first = text.find("①"), text.find("②")
    # The answer that is named first keeps its sign; the other is marked, so that a pattern can ask for two that differ.
    if min(first) >= 0:
        text = text.replace("②", "❷") if first[0] < first[1] else text.replace("①", "❶")
    if maybe_cut and not closed and text in ("①", "②"):
        return None
    for pattern in statements if closed else statements[:-1]:
        if match := pattern.fullmatch(text):
            return 1 if match[1] in "①1" else 2
    return "tie" if any(pattern.fullmatch(text) for pattern in ties) else None


def _plain(text: str) -> str:
    """Without markup, width, case and spare space; a line break is a colon, as between a heading and its text."""
    text = BOXED.sub(r"\1", unicodedata.normalize("NFKC", text.strip()).casefold())
    text = MARKUP.sub("", text).replace("_", " ").strip().removeprefix("- ").rstrip(" .。!")
    text = " ".join(text.replace("\n", ":").split())
    return re.sub(r" ?([^\x00-\x7f]|[:,]) ?", r"\1", text)


def _number(match: re.Match) -> str:
    name = next(group for group in match.groups() if group)
    return NUMBERS.get(name, "②")


@functools.cache
def _grammar(answer_name: str, verdict_key: str) -> tuple[re.Pattern, list[re.Pattern], list[re.Pattern]]:
    name, key = re.escape(_plain(answer_name)), re.escape(_plain(verdict_key))
    names = re.compile(
        r"第 ?([12一二]) ?(?:[个条份] ?(?:回答|答案|答复|回复)?|(?:回答|答案))"
        rf"|(?:回答|答案|答复|回复|{name}) ?([12]|[一二](?![样致般直些点起定切旦共个]))(?!\.?\d)"
        r"|(前者|后者)"
        rf"|\b(?:the )?(?:answers?|response|option|{name}) (?:number |no\. )?([12]|one|two)\b(?!\.?\d)"
        rf"|\b(?:the )?(first|second|1st|2nd) {ANSWER_EN}\b"
        r"|\bthe (first|second|former|latter)\b"
    )
    compiled = [
        [re.compile(pattern.replace("KEY", key)) for pattern in group] for group in ([*STATEMENTS, CLOSED], TIES)
    ]
    return names, *compiled
