"""What stands around the object of a judgment: whether it says that the object is not the judge's own, or takes it back."""

import re

NEAR = 1000  # characters beside an object in which the judge may say otherwise
FENCE_BEFORE = re.compile(r"(?:```|~~~)\w*\s*\Z")
OPENING = re.compile(r"(?:<\w+>|[\s*\[(（#>]+)\Z")
# The words of a phrase that introduces a judgment of one's own. One of other words ("answer 1 says:", "a wrong output would
# be", "for example") may introduce a quote or an example.
INTRODUCTION = re.compile(
    r"(?:\W|_|我|的|最终|最后|综合|总体|判断|判定|评判|评价|评估|结果|结论|裁决|输出|答案|json|格式(?!\W*\Z)|如下|以下|下面|是|为|给出|按照?|根据"
    r"|以上|标准|要求|经过|思考|总的来说|综上所述|综上|因此|所以|好|当然|可以|再说一遍|这|评审|意见|回复|请看"
    r"|\b(?:here|is|are|the|this|it|my|final|overall|judge?ments?|verdict|result|conclusion|decision|output|evaluation|assessment"
    r"|answer(?! ?[12])|response|object|in|as|(?:in the format )?(?:that )?you (?:asked for|go|requested|wanted)|requested"
    r"|format(?!\W*\Z)|sure|okay|ok|certainly|of course|so|thus|therefore|hence|based|on|follows|below|and|i|s)\b)*+",
    re.IGNORECASE,
)
SUPPOSES = re.compile(r"假如|如果|假设|倘若|要是|若|\b(?:if|unless|had)\b", re.IGNORECASE)
TAKEN_BACK = re.compile(
    r"\bwait\b|\bactually\b|\bin fact\b|correction|\brevis(?:ed|ion)|on (?:second thought|reflection)|\binjected\b|i made a mistake|\bsorry\b|\brefuse"
    r"|not (?:my|a) judge?ment|scratch that|kidding|\b(?:ignore|disregard) (?:the above|that|this|my|it)\b"
    r"|\b(?:the above|this|that|it) (?:is|was) (?:only |just )?(?:an? |what )"
    r"|(?:^|[\s。，,!！])(?:不对|等等|等一下)[，。,!！…]|其实|核对|再看|再想|更正|纠正|改为|看错|弄错|写反|有误|作废|忽略|应为|抱歉|拒绝|这不是|摘自|注入"
    r"|(?:上面|上述|以上)(?:只|仅|都)?是?(?:示例|例子|格式)",
    re.IGNORECASE,
)


def is_introduced(before: str) -> bool:
    """Whether an object may be the judge's own, by what stands before it: it begins a sentence or a line, or a phrase
    introduces it as a judgment."""
    before = FENCE_BEFORE.sub("", before[-NEAR:])
    if re.search(r"[:：,，]\W*\Z", before):
        before = before.rstrip()
    while opening := OPENING.search(before.rpartition("\n")[2]):
        before = before[: len(before) - len(opening[0])]
    sentence = re.split(r"(?<!e\.g)[。.!！?？;；\n]", before, flags=re.IGNORECASE)[-1].rstrip(" ,，:：")
    clause = re.split(r"[,，]", sentence)[-1]
    return INTRODUCTION.fullmatch(clause) is not None and not SUPPOSES.search(sentence)
