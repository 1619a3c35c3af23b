"""Words of the sample corpus: domains, what is judged in them, and how people open and close a review.
The sample corpus: Chinese reviews from a grammar of this project, so that a run needs no network and no files.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from datasets import Dataset


# Words of the sample corpus: domains, what is judged in them, and how people open and close a review.
#
# Everything here was written for this project. An aspect is (noun, good words, bad words); words of two characters can
# be negated (不 + good = bad) and take a degree (很), longer ones stand alone. Every list has one of two characters.


class Domain(NamedTuple):
    """What a review of one kind of thing can say."""

    thing: str
    openings: tuple[str, ...]
    aspects: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]
    good_end: tuple[str, ...]
    bad_end: tuple[str, ...]


HOTEL = Domain(
    "酒店",
    ("上周出差住了两晚", "带父母来旅游选了这里", "半夜才到店", "提前一个月订的房", "第二次入住", "朋友推荐来的"),
    (
        ("房间", ("干净", "宽敞", "温馨"), ("狭小", "潮湿", "有霉味")),
        ("前台", ("热情", "耐心", "专业"), ("冷淡", "爱理不理", "手忙脚乱")),
        ("早餐", ("丰富", "可口", "新鲜"), ("单调", "难吃", "凉透了")),
        ("隔音", ("理想", "到位", "出色"), ("糟糕", "形同虚设", "很差")),
        ("床", ("舒服", "柔软", "宽大"), ("硬邦邦", "吱呀响", "塌陷")),
        ("位置", ("方便", "优越", "好找"), ("偏僻", "难找", "嘈杂")),
        ("热水", ("充足", "稳定", "来得快"), ("冰凉", "忽冷忽热", "不够用")),
    ),
    ("下次还住这里", "值得再来", "会推荐给同事", "住得很安心"),
    ("再也不会来了", "大家慎重选择", "钱花得冤枉", "住得一肚子气"),
)
COMPUTER = Domain(
    "电脑",
    ("用了半个月来说说", "给孩子上学买的", "换掉旧本子入手的", "公司统一采购", "等了三天才到货", "学生党一枚"),
    (
        ("屏幕", ("清晰", "细腻", "通透"), ("偏黄", "漏光", "模糊")),
        ("键盘", ("舒服", "扎实", "灵敏"), ("松垮", "误触多", "硌手")),
        ("散热", ("优秀", "给力", "出色"), ("糟糕", "烫手", "噪音大")),
        ("电池", ("耐用", "持久", "扛用"), ("虚标", "掉电快", "撑不过上午")),
        ("做工", ("精致", "扎实", "考究"), ("粗糙", "毛刺多", "廉价")),
        ("系统", ("流畅", "稳定", "干净"), ("卡顿", "蓝屏", "臃肿")),
        ("客服", ("耐心", "热心", "专业"), ("推诿", "敷衍", "不回消息")),
    ),
    ("这钱花得值", "用着顺手", "推荐入手", "相当满意"),
    ("已经申请退货", "后悔买了", "不建议购买", "越用越闹心"),
)
BOOK = Domain(
    "书",
    ("一口气读完了", "给女儿买的生日礼物", "读书会上大家选的", "断断续续看了一个月", "看了书评才下单", "作者的第三本"),
    (
        ("情节", ("紧凑", "动人", "曲折"), ("拖沓", "老套", "混乱")),
        ("文笔", ("优美", "细腻", "老练"), ("生硬", "啰嗦", "干瘪")),
        ("翻译", ("流畅", "准确", "传神"), ("拗口", "错漏多", "像机翻")),
        ("印刷", ("清晰", "精美", "考究"), ("模糊", "掉墨", "错字连篇")),
        ("纸张", ("厚实", "细腻", "护眼"), ("发黄", "粗糙", "透字")),
        ("观点", ("新颖", "深刻", "独到"), ("陈旧", "肤浅", "片面")),
        ("装帧", ("精致", "牢固", "大气"), ("脱胶", "掉页", "简陋")),
    ),
    ("值得收藏", "想再读一遍", "送人也体面", "受益匪浅"),
    ("读不下去", "浪费时间", "准备送去废品站", "实在失望"),
)
RESTAURANT = Domain(
    "餐馆",
    (
        "周末和同学聚餐",
        "排了一个小时的队",
        "路过随便进来的",
        "冲着网上的评价来的",
        "家里人过生日订的包间",
        "中午工作餐",
    ),
    (
        ("味道", ("鲜美", "地道", "正宗"), ("寡淡", "太咸", "怪怪的")),
        ("环境", ("雅致", "舒适", "安静"), ("嘈杂", "闷热", "脏乱")),
        ("上菜", ("迅速", "及时", "有条理"), ("慢吞吞", "拖拉", "总漏单")),
        ("食材", ("新鲜", "讲究", "实在"), ("不新鲜", "发蔫", "有异味")),
        ("服务员", ("热情", "周到", "勤快"), ("冷漠", "不耐烦", "找不到人")),
        ("分量", ("充足", "实在", "厚道"), ("偏少", "缩水", "不够塞牙缝")),
        ("价格", ("公道", "实惠", "合理"), ("虚高", "离谱", "不透明")),
    ),
    ("下回还来", "吃得心满意足", "已经加入收藏", "全家都说好"),
    ("不会再光顾", "吃得窝火", "回家又煮了面", "白跑一趟"),
)
PHONE = Domain(
    "手机",
    ("入手一周", "给爸妈换的新机", "双十一抢的", "从别的牌子换过来", "以旧换新买的", "当备用机用"),
    (
        ("拍照", ("清晰", "自然", "讨喜"), ("发灰", "糊成一片", "偏色")),
        ("续航", ("持久", "扛打", "惊喜"), ("拉胯", "缩水", "撑不到晚上")),
        ("手感", ("轻巧", "圆润", "高级"), ("割手", "笨重", "滑腻")),
        ("信号", ("稳定", "满格", "可靠"), ("断断续续", "飘忽", "时常掉线")),
        ("充电", ("神速", "省心", "快捷"), ("发烫", "缓慢", "时灵时不灵")),
        ("音质", ("饱满", "清亮", "震撼"), ("刺耳", "发闷", "破音")),
        ("物流", ("飞快", "准时", "贴心"), ("龟速", "暴力", "一拖再拖")),
    ),
    ("没白等", "满意极了", "性价比超预期", "还会回购"),
    ("想砸了它", "坐等退款", "被广告骗了", "劝大家绕道"),
)
PARK = Domain(  # only in test rows marked "unseen"
    "景区",
    ("国庆带孩子去的", "跟团路过", "清早就来排队", "老同学相约爬山", "本地人免费进的"),
    (
        ("风景", ("秀丽", "开阔", "迷人"), ("平淡", "名不副实", "灰蒙蒙")),
        ("门票", ("公道", "实惠", "划算"), ("虚高", "离谱", "坑人")),
        ("指示牌", ("清晰", "醒目", "周到"), ("混乱", "模糊", "缺失")),
        ("厕所", ("干净", "好找", "宽敞"), ("脏乱", "难找", "有异味")),
        ("导游", ("热情", "专业", "风趣"), ("敷衍", "冷淡", "只顾推销")),
        ("索道", ("平稳", "安全", "快捷"), ("拥挤", "停运", "排队太久")),
    ),
    ("值得专程去一次", "玩得尽兴", "会再来的"),
    ("去一次就够了", "玩得扫兴", "不如在家睡觉"),
)

SEEN_DOMAINS = (HOTEL, COMPUTER, BOOK, RESTAURANT, PHONE)
UNSEEN_DOMAIN = PARK

DEGREES = ("很", "非常", "特别", "真的", "相当", "挺", "确实", "")
GOOD_HEDGES = ("还算", "算是", "基本上")
BAD_HEDGES = ("多少有点", "稍微有点", "算是")
ASIDES = ("，就说到这儿", "，仅供参考", "，随手写几句", "，个人感受", "，照实说", "，补充一下", "", "", "", "")


# The sample corpus: Chinese reviews from a grammar of this project, so that a run needs no network and no files.
#
# A review is an opening, clauses about aspects of a thing, and sometimes a verdict. Its label is what the reviewer
# means in the end: 虽然 A，但是 B means B; 不 turns a word round; with mixed aspects the verdict decides; hedges weaken
# but
# do not turn. A word count alone therefore cannot solve it: in most patterns words of both polarities occur.
#
# One third of the test rows is marked ``pattern: unseen``: sentence patterns or a domain (景区) that no training row
# has.
# Deliberate faults, so that the audit has something to find (`FAULTS`, counted in rows): exact copies of train rows in
# the test split, copies that differ only in punctuation, near-copies, copies within train, texts with both labels,
# empty texts. They are put in after the distinct rows have been made.

VERSION = 1
SIZES = {"train": 3000, "validation": 400, "test": 600}
"""Distinct rows a split, before the faults."""

UNSEEN_SHARE = 1 / 3
FAULTS = {
    "train rows copied into test": 9,
    "train rows copied into test, other punctuation": 6,
    "train rows copied into test, two characters added": 6,
    "train rows copied within train": 12,
    "train rows copied within train with the other label": 5,
    "empty train rows": 3,
}
SEED = 20_240_517
"""The corpus is one fixed data set: its seed is not the run's seed."""


def short(choices: tuple[str, ...]) -> list[str]:
    """Those of two characters, which can be negated."""
    return [word for word in choices if len(word) == 2 and word[0] not in "不太没"]


class Writer:
    """Draws the parts of a review about one domain; `good` is the polarity a part must have."""

    def __init__(self, rng: random.Random, domain: Domain) -> None:
        self.rng, self.domain = rng, domain
        self.aspects = rng.sample(domain.aspects, len(domain.aspects))
        self.opening = rng.choice((rng.choice(domain.openings) + "，", ""))

    def clause(self, good: bool, plain: bool = False) -> str:
        """A statement about the next aspect: direct, or (unless `plain`) negated or hedged."""
        noun, liked, disliked = self.aspects.pop()
        word, form = self.rng.choice(liked if good else disliked), self.rng.random()
        if not plain and form < 0.22:
            nots = ("没有想象中", "并不", "一点也不") if good else ("不", "不太", "一点也不", "谈不上")
            return noun + self.rng.choice(nots) + self.rng.choice(short(disliked if good else liked))
        if not plain and form < 0.36:
            return noun + self.rng.choice(GOOD_HEDGES if good else BAD_HEDGES) + word
        return noun + self.degree(word)

    def degree(self, word: str) -> str:
        """The word, a short one with an adverb of degree or without."""
        return (self.rng.choice(DEGREES) if len(word) == 2 else "") + word

    def end(self, good: bool) -> str:
        return self.rng.choice(self.domain.good_end if good else self.domain.bad_end)


def _direct(w: Writer, good: bool) -> str:
    return f"{w.clause(good)}，{w.clause(good)}，{w.rng.choice((w.clause(good), w.end(good)))}。"


def _contrast(w: Writer, good: bool) -> str:
    joint = w.rng.choice(("，但是", "，但", "，不过"))
    return f"虽然{w.clause(not good)}{joint}{w.clause(good)}，{w.clause(good)}。"


def _concession(w: Writer, good: bool) -> str:
    lead = w.rng.choice(("总体", "综合来看"))
    return f"{w.clause(not good)}，{w.clause(not good)}，可{w.clause(good)}，{lead}{w.end(good)}。"


def _verdict(w: Writer, good: bool) -> str:
    first, second = (w.clause(good), w.clause(not good))
    if w.rng.random() < 0.5:
        first, second = second, first
    lead = w.rng.choice(("总的来说", "总之", "说到底"))
    return f"{first}，{second}，{w.clause(not good)}。{lead}，{w.end(good)}。"


def _expectation(w: Writer, good: bool) -> str:
    feared, met = w.aspects.pop(), w.aspects.pop()
    hoped = w.rng.choice(feared[2] if good else feared[1])
    real = w.rng.choice(met[1] if good else met[2])
    return f"本来以为{feared[0]}{hoped}，没想到{met[0]}{w.degree(real)}，{w.clause(good)}。"


def _others(w: Writer, good: bool) -> str:
    said = w.rng.choice(("网上都说", "别人都夸" if not good else "别人都骂", "评论里说"))
    own = w.rng.choice(("我觉得", "自己试下来"))
    return f"{said}{w.clause(not good, plain=True)}，{own}{w.clause(good)}，{w.clause(good)}。"


def _despite(w: Writer, good: bool) -> str:
    return f"尽管{w.clause(not good)}，{w.clause(good)}，{w.clause(good)}这两点更要紧。"


def _reversed(w: Writer, good: bool) -> str:
    return f"{w.clause(good)}，{w.clause(good)}，即使{w.clause(not good)}也不改变我的看法。"


def _question(w: Writer, good: bool) -> str:
    noun, liked, disliked = w.aspects.pop()
    if good:
        return f"谁说{noun}{w.rng.choice(disliked)}？我看{w.clause(True)}，{w.clause(True)}。"
    return f"{noun}这样也叫{w.rng.choice(short(liked))}？{w.clause(False)}，{w.clause(False)}。"


def _if_only(w: Writer, good: bool) -> str:
    noun, liked, disliked = w.aspects.pop()
    if good:
        return f"{w.clause(True)}，{w.clause(True)}，就算{noun}{w.rng.choice(short(disliked))}一点我也认了。"
    return f"要是{noun}{w.rng.choice(short(liked))}一些就好了，{w.clause(False)}，{w.clause(False)}。"


Pattern = Callable[[Writer, bool], str]
SEEN: tuple[tuple[Pattern, float], ...] = (
    (_direct, 0.22),
    (_contrast, 0.22),
    (_concession, 0.14),
    (_verdict, 0.20),
    (_expectation, 0.11),
    (_others, 0.11),
)
UNSEEN: tuple[tuple[Pattern, float], ...] = ((_despite, 0.3), (_reversed, 0.3), (_question, 0.2), (_if_only, 0.2))


def _review(rng: random.Random, good: bool, unseen: bool) -> str:
    patterns = SEEN
    domain = rng.choice(SEEN_DOMAINS)
    if unseen and rng.random() < 0.5:
        domain = UNSEEN_DOMAIN
    elif unseen:
        patterns = UNSEEN
    pattern = rng.choices([p for p, _ in patterns], [weight for _, weight in patterns])[0]
    writer = Writer(rng, domain)
    text = writer.opening + pattern(writer, good)
    return text[:-1] + rng.choice(ASIDES) + text[-1]


def reviews() -> dict[str, list[dict[str, Any]]]:
    """The rows of each split: text, label (0 negative, 1 positive), pattern ("seen" or "unseen"); faults included."""
    from lib.stages.data.near_duplicates import normalise

    rng = random.Random(SEED)
    known: set[str] = set()
    splits: dict[str, list[dict[str, Any]]] = {}
    for split, size in SIZES.items():
        rows = splits[split] = []
        while len(rows) < size:
            label = len(rows) % 2
            unseen = split == "test" and len(rows) % 6 in (1, 4)  # one third, both labels alike
            text = _review(rng, bool(label), unseen)
            if normalise(text) not in known:
                known.add(normalise(text))
                rows.append({"text": text, "label": label, "pattern": "unseen" if unseen else "seen"})
    _add_faults(splits, rng)
    for rows in splits.values():
        rng.shuffle(rows)
    return splits


def _add_faults(splits: dict[str, list[dict[str, Any]]], rng: random.Random) -> None:
    """Copies, contradictions and empty rows, as `FAULTS` counts them, each of another train row."""
    train, test = splits["train"], splits["test"]
    chosen = iter(rng.sample(train, sum(FAULTS.values())))

    def with_text(row: dict[str, Any], text: str) -> dict[str, Any]:
        return {**row, "text": text}

    changes: tuple[tuple[list, Callable[[dict[str, Any]], dict[str, Any]]], ...] = (
        (test, dict),
        (test, lambda row: with_text(row, row["text"].replace("，", " ") + "！")),
        (test, lambda row: with_text(row, row["text"] + "哈哈")),
        (train, dict),
        (train, lambda row: {**row, "label": 1 - row["label"]}),
        (train, lambda row: with_text(row, "  ")),
    )
    for count, (target, change) in zip(FAULTS.values(), changes, strict=True):
        target += [change(next(chosen)) for _ in range(count)]


def sample_tables() -> dict[str, Dataset]:
    """The sample corpus as `datasets` tables: train, validation, test."""
    from datasets import Dataset

    return {name: Dataset.from_list(rows) for name, rows in reviews().items()}
