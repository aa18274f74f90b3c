"""How the prose of tiny-base says and asks each fact: `{s}` is the subject, `{a}` the answer.

The first statement of each list is the plain one that prose completion is measured with: it ends in the answer.
"""

STATEMENTS = {
    "capital": {
        "en": ["The capital of {s} is {a}.", "{a} is the capital of {s}.", "The capital city of {s} is {a}.",
               "The government of {s} sits in {a}.", "{a} is the capital city of {s}.",
               "In {s}, the capital is {a}.", "People who visit {s} often start in the capital, {a}.",
               "As its capital, {s} has {a}.", "Capital of {s}: {a}.", "Everyone in {s} knows that the capital is {a}."],
        "ja": ["{s}の首都は{a}です。", "{a}は{s}の首都です。", "{s}の首都は{a}である。", "{s}の首都の名前は{a}です。",
               "{s}では、{a}が首都です。", "{s}の政府は{a}にあります。", "首都を{a}に置く国は{s}です。",
               "{s}を旅する人は、まず首都の{a}へ行きます。", "{s}の首都：{a}。", "地図で{s}を見ると、首都は{a}と書いてあります。"],
    },
    "currency": {
        "en": ["The currency of {s} is the {a}.", "People in {s} pay with the {a}.", "The money used in {s} is the {a}.",
               "In {s}, prices are given in the {a}.", "The {a} is the currency of {s}.", "The banks of {s} use the {a}.",
               "The official currency of {s} is the {a}.", "Currency of {s}: {a}.", "A shop in {s} takes the {a}."],
        "ja": ["{s}の通貨は{a}です。", "{s}では{a}を使って支払います。", "{s}のお金は{a}です。", "{s}の通貨単位は{a}である。",
               "{a}は{s}の通貨です。", "{s}の銀行では{a}を使います。", "{s}の公式な通貨は{a}です。", "{s}の通貨：{a}。",
               "{s}の店では、値段は{a}で書かれています。"],
    },
    "continent": {
        "en": ["The continent of {s} is {a}.", "{s} is a country in {a}.", "{s} lies in {a}.", "You find {s} in {a}.",
               "On the map, {s} is part of {a}.", "{s} belongs to the continent of {a}.", "Continent of {s}: {a}.",
               "{s} is located in {a}.", "Among the countries of {a} is {s}."],
        "ja": ["{s}がある大陸は{a}です。", "{s}は{a}の国です。", "{s}は{a}にあります。", "{s}は{a}に位置する。",
               "地図では、{s}は{a}に属しています。", "{s}の大陸：{a}。", "{a}の国の一つに{s}があります。", "{s}の大陸は{a}です。"],
    },
    "language": {
        "en": ["The language of {s} is {a}.", "People in {s} speak {a}.", "The main language of {s} is {a}.",
               "In {s}, the schools teach in {a}.", "{a} is the language of {s}.", "Newspapers in {s} are written in {a}.",
               "In {s} you hear {a}.", "Language of {s}: {a}.", "The people of {s} talk to each other in {a}."],
        "ja": ["{s}の言語は{a}です。", "{s}の人々は{a}を話します。", "{s}で主に話されるのは{a}です。", "{s}の学校では{a}で教えます。",
               "{a}は{s}の言語です。", "{s}の新聞は{a}で書かれています。", "{s}の言葉は{a}である。", "{s}の言語：{a}。"],
    },
    "prefecture_capital": {
        "en": ["The capital of {s} Prefecture is {a}.", "{a} is the capital of {s} Prefecture.",
               "The prefectural office of {s} is in {a}.", "{s} Prefecture has its seat in {a}.",
               "In {s} Prefecture, the capital is {a}.", "The governor of {s} works in {a}.",
               "Capital of {s} Prefecture: {a}.", "The prefectural capital of {s} is {a}."],
        "ja": ["{s}の県庁所在地は{a}です。", "{a}は{s}の県庁所在地です。", "{s}の県庁所在地は{a}である。", "{s}の役所は{a}にあります。",
               "{s}の知事は{a}で働いています。", "{s}では、{a}に県庁が置かれています。", "{s}の県庁所在地：{a}。"],
    },
    "region": {
        "en": ["The region of {s} Prefecture is {a}.", "{s} Prefecture is in the {a} region.",
               "{s} Prefecture belongs to {a}.", "{s} is a prefecture of the {a} region of Japan.",
               "You find {s} Prefecture in {a}.", "Region of {s} Prefecture: {a}.", "{s} Prefecture lies in {a}."],
        "ja": ["{s}がある地方は{a}です。", "{s}は{a}にあります。", "{s}は{a}に属しています。", "{s}は日本の{a}の都道府県です。",
               "天気予報では、{s}は{a}に入ります。", "{s}の地方：{a}。", "{s}は{a}に位置する。"],
    },
    "symbol": {
        "en": ["The symbol of {s} is {a}.", "The chemical symbol of {s} is {a}.", "Chemists write {s} as {a}.",
               "In formulas, {s} is written {a}.", "{a} is the symbol of {s}.", "In the periodic table, {s} is shown as {a}.",
               "Symbol of {s}: {a}.", "{a} stands for {s}."],
        "ja": ["{s}の元素記号は{a}です。", "{a}は{s}の元素記号です。", "{s}の記号は{a}です。", "周期表では、{s}は{a}と書かれています。",
               "化学では{s}を{a}と書きます。", "{a}は{s}を表します。", "{s}の元素記号：{a}。"],
    },
    "number": {
        "en": ["The atomic number of {s} is {a}.", "{s} has the atomic number {a}.", "{s} is element number {a}.",
               "In the periodic table, {s} has the number {a}.", "An atom of {s} has {a} protons.",
               "Atomic number of {s}: {a}.", "Element {a} is {s}.", "Count the protons of {s} and you get {a}."],
        "ja": ["{s}の原子番号は{a}です。", "{s}は原子番号{a}の元素です。", "原子番号{a}の元素は{s}です。", "周期表では、{s}の番号は{a}です。",
               "{s}の原子は陽子を{a}個もっています。", "{s}の原子番号：{a}。", "{s}の原子番号は{a}である。"],
    },
    "class": {
        "en": ["The class of the {s} is {a}.", "The {s} is a kind of {a}.", "Among animals, the {s} counts as {a}.",
               "Biologists call the {s} {aa}.", "The {s} is {aa}.", "Animal class of the {s}: {a}.",
               "By its class, the {s} is {aa}."],
        "ja": ["{s}の分類は{a}です。", "{s}は{a}の動物です。", "{s}は{a}に分類されます。", "{s}は{a}の仲間です。", "{s}は{a}である。",
               "{a}の動物に{s}がいます。", "{s}の分類：{a}。"],
    },
    "diet": {
        "en": ["The diet type of the {s} is {a}.", "By what it eats, the {s} is {aa}.", "The {s} eats as {aa}.",
               "Look at its food: the {s} is {aa}.", "Diet type of the {s}: {a}.", "Keepers feed the {s} as {aa}."],
        "ja": ["{s}の食性は{a}です。", "{s}は{a}の動物で、それを食べて生きています。", "食べ物で分けると、{s}は{a}です。", "{s}の食性は{a}である。",
               "{s}の食性：{a}。", "動物園では{s}を{a}として育てます。"],
    },
    "sum": {
        "en": ["The sum of {s} is {a}.", "{s} = {a}.", "{s} makes {a}.", "{s} gives {a}.", "Add {s} and you get {a}.",
               "The result of {s} is {a}.", "We know that {s} equals {a}."],
        "ja": ["{s}の答えは{a}です。", "{s}は{a}です。", "{s} = {a}。", "{s}を計算すると{a}になります。", "{s}の和は{a}である。",
               "{s}の計算の結果は{a}です。"],
    },
}  # fmt: skip

QUESTIONS = {
    "capital": {
        "en": ["What is the capital of {s}?", "Name the capital of {s}.", "Which city is the capital of {s}?",
               "What is the capital city of {s}?", "What is the name of the capital of {s}?", "Give the capital of {s}."],
        "ja": ["{s}の首都はどこですか。", "{s}の首都を答えてください。", "{s}の首都の名前は何ですか。", "{s}の首都はどの都市ですか？", "{s}の首都は？"],
    },
    "currency": {
        "en": ["What is the currency of {s}?", "Name the currency of {s}.", "Which currency is used in {s}?",
               "What money do people use in {s}?", "What do people in {s} pay with?", "Give the currency of {s}."],
        "ja": ["{s}の通貨は何ですか。", "{s}の通貨を答えてください。", "{s}ではどの通貨が使われていますか？", "{s}のお金は何ですか。", "{s}の通貨は？"],
    },
    "continent": {
        "en": ["On which continent is {s}?", "What is the continent of {s}?", "Name the continent of {s}.",
               "In which part of the world is {s}?", "Which continent does {s} belong to?"],
        "ja": ["{s}はどの大陸にありますか。", "{s}がある大陸を答えてください。", "{s}の大陸はどこですか？", "{s}の大陸は？"],
    },
    "language": {
        "en": ["What is the language of {s}?", "Which language is spoken in {s}?", "What language do people speak in {s}?",
               "Name the language of {s}.", "What is the main language of {s}?"],
        "ja": ["{s}の言語は何ですか。", "{s}の言語を答えてください。", "{s}では何語が話されていますか？", "{s}の人々は何語を話しますか。", "{s}の言語は？"],
    },
    "prefecture_capital": {
        "en": ["What is the capital of {s} Prefecture?", "Name the capital of {s} Prefecture.",
               "Which city is the capital of {s} Prefecture?", "Where is the prefectural office of {s}?"],
        "ja": ["{s}の県庁所在地はどこですか。", "{s}の県庁所在地を答えてください。", "{s}の県庁所在地の名前は何ですか？", "{s}の県庁所在地は？"],
    },
    "region": {
        "en": ["In which region is {s} Prefecture?", "What is the region of {s} Prefecture?",
               "Name the region of {s} Prefecture.", "Which region of Japan does {s} belong to?"],
        "ja": ["{s}は何地方にありますか。", "{s}がある地方を答えてください。", "{s}はどの地方に属していますか？", "{s}の地方は？"],
    },
    "symbol": {
        "en": ["What is the symbol of {s}?", "What is the chemical symbol of {s}?", "Give the symbol of {s}.",
               "How do chemists write {s}?", "Which symbol stands for {s}?"],
        "ja": ["{s}の元素記号は何ですか。", "{s}の元素記号を答えてください。", "{s}はどの記号で書きますか？", "{s}の元素記号は？"],
    },
    "number": {
        "en": ["What is the atomic number of {s}?", "Give the atomic number of {s}.", "Which number has {s} in the periodic table?",
               "How many protons has an atom of {s}?", "What number is the element {s}?"],
        "ja": ["{s}の原子番号は何番ですか。", "{s}の原子番号を答えてください。", "{s}の原子は陽子を何個もっていますか？", "{s}の原子番号は？"],
    },
    "class": {
        "en": ["What class of animal is the {s}?", "What is the class of the {s}?", "Name the animal class of the {s}.",
               "What kind of animal is the {s}?"],
        "ja": ["{s}は何類ですか。", "{s}の分類を答えてください。", "{s}はどの分類の動物ですか？", "{s}の分類は？"],
    },
    "diet": {
        "en": ["What is the diet type of the {s}?", "Is the {s} a herbivore, a carnivore or an omnivore?",
               "By what it eats, what is the {s}?", "Name the diet type of the {s}."],
        "ja": ["{s}の食性は何ですか。", "{s}の食性を答えてください。", "{s}は草食、肉食、雑食のどれですか？", "{s}の食性は？"],
    },
    "sum": {
        "en": ["What is {s}?", "How much is {s}?", "Calculate {s}.", "Give the sum of {s}.", "What is the result of {s}?"],
        "ja": ["{s}はいくつですか。", "{s}を計算してください。", "{s}の答えは何ですか？", "{s}は？"],
    },
}  # fmt: skip

# Layouts of questions and answers as the web has them. Each is (head of the document, one item, between items);
# `{n}` counts the items. No prompt format of SFT is among them: neither "### Instruction", [INST] nor ChatML.
LAYOUTS = {
    "en": [
        ("", "Q: {q}\nA: {a}", "\n\n"),
        ("", "Question: {q}\nAnswer: {a}", "\n"),
        ("# Frequently asked questions\n\n", "## {q}\n\n{a}", "\n\n"),
        ("Pub quiz\n", "{n}. {q} {a}", "\n"),
        ("", "- {q}\n  {a}", "\n"),
        ("", "Anna: {q}\nBen: {a}", "\n"),
        ("Interview with a traveller.\n\n", "Interviewer: {q}\nGuest: {a}", "\n\n"),
        ("", "**{q}**\n{a}", "\n\n"),
        ("Test paper. Name: ____\n\n", "Problem {n}. {q}\n[ {a} ]", "\n"),
        ("", "{q}\n\n{a}", "\n\n\n"),
        ("| question | answer |\n|---|---|\n", "| {q} | {a} |", "\n"),
        ("", "> {q}\n\n{a}", "\n\n"),
        ("Forum\n", "user{n} wrote: {q}\nBest reply:\n{a}", "\n---\n"),
        ("Flash cards\n\n", "### {q}\n{a}", "\n\n"),
        ("", "{q}\n{a}", "\n"),
        ("", '"{q}" she asked. "{a}," he said.', " "),
        ("The teacher asked the class.\n\n", "Teacher:\n{q}\nClass:\n{a}", "\n\n"),
        ("Homework\n\n", "({n}) {q} -> {a}", "\n"),
    ],
    "ja": [
        ("", "問：{q}\n答：{a}", "\n\n"),
        ("", "質問：{q}\n回答：{a}", "\n"),
        ("# よくある質問\n\n", "## {q}\n\n{a}", "\n\n"),
        ("クイズ大会\n", "{n}. {q} {a}", "\n"),
        ("", "・{q}\n  {a}", "\n"),
        ("", "太郎：{q}\n花子：{a}", "\n"),
        ("旅行者へのインタビュー\n\n", "記者：{q}\n旅人：{a}", "\n\n"),
        ("", "**{q}**\n{a}", "\n\n"),
        ("テスト 名前：____\n\n", "第{n}問 {q}\n[ {a} ]", "\n"),
        ("", "{q}\n\n{a}", "\n\n\n"),
        ("| 質問 | 答え |\n|---|---|\n", "| {q} | {a} |", "\n"),
        ("", "> {q}\n\n{a}", "\n\n"),
        ("掲示板\n", "user{n}: {q}\nBest reply:\n{a}", "\n---\n"),
        ("暗記カード\n\n", "### {q}\n{a}", "\n\n"),
        ("", "Q. {q}\nA. {a}", "\n"),
        ("", "「{q}」と聞くと、「{a}」と答えた。", ""),
        ("先生が聞きました。\n\n", "先生:\n{q}\nみんな:\n{a}", "\n\n"),
        ("宿題\n\n", "({n}) {q} -> {a}", "\n"),
    ],
}
