"""Rendering: from an `Example` to the token ids of a `Sample`, through the chat template."""

from dataclasses import dataclass, replace

from .schema import Example

# open-unlearning's date: some templates insert today's, and then results would change every day
DATE = "10 Apr 2025"
MAX_TOKENS = 512  # of an answer, without its end of turn; a longer text is split
TEXT_TURN = 16  # tokens of a plain text that stand in for its question


@dataclass
class Sample:
    """An example as token ids. The loss is on `ids[start:]`, the answer and the end of turn."""

    ids: list[int]
    start: int
    label: int = 0  # 0: retain; d: forget, sub-domain d
    index: int = -1  # position in the frozen outputs of phase one
    turn: int = 0  # start of the assistant's turn: `start` minus the answer prefix
    refusal: bool = False  # a refusal in place of a forget answer
    source: str = ""  # the text that it comes from, if that is a plain text


def render(tokenizer, example: Example) -> list[Sample]:
    """The samples of an example: one for a question, one per window for a plain text."""
    if not example.question:
        ids = tokenizer(example.answer).input_ids
        windows = (ids[i : i + MAX_TOKENS] for i in range(0, len(ids), MAX_TOKENS))
        # a plain text has no question: its first tokens tell what it is about
        windows = (w for w in windows if len(w) > 1)
        source = example.source or example.answer
        return [Sample(w, 1, turn=min(TEXT_TURN, len(w) - 1), source=source) for w in windows]
    text = prompt_text(tokenizer, example.question)
    prompt = prompt_ids(tokenizer, text)
    turn, gap = len(prompt), "" if tokenizer.chat_template else " "
    if example.answer_prefix:
        prefix, gap = gap + example.answer_prefix, ""
        prompt = prompt + continuation_ids(tokenizer, text, prompt, prefix)
        text += prefix
    answer = continuation_ids(tokenizer, text, prompt, gap + example.answer)[:MAX_TOKENS]
    ids = [*prompt, *answer, tokenizer.eos_token_id]
    return [Sample(ids, len(prompt), turn=turn, source=example.source)]


def render_examples(tokenizer, examples: list[Example], tokens: int | None = None) -> list[Sample]:
    """Samples of the examples, their answers cut to `tokens` tokens."""
    samples = [s for e in examples for s in render(tokenizer, e)]
    return [replace(s, ids=s.ids[: s.start + tokens]) for s in samples] if tokens else samples


def render_prompt(tokenizer, question: str, turns=()) -> list[int]:
    """The token ids of a question, after `turns`, up to where the answer starts."""
    return prompt_ids(tokenizer, prompt_text(tokenizer, question, turns))


def prompt_text(tokenizer, question: str, turns=()) -> str:
    """The question in the chat template, or in a plain form if the tokenizer has none.

    `turns`: pairs of a question and an answer that came before.
    """
    if not tokenizer.chat_template:
        before = "".join(f"Question: {q}\nAnswer: {a}\n" for q, a in turns)
        return f"{before}Question: {question}\nAnswer:"
    chat = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    chat.append({"role": "user", "content": question})
    options = {"tokenize": False, "add_generation_prompt": True, "date_string": DATE}
    return tokenizer.apply_chat_template(chat, **options)


def prompt_ids(tokenizer, text: str) -> list[int]:
    """The token ids of a prompt. A chat template already contains the special tokens."""
    return tokenizer(text, add_special_tokens=not tokenizer.chat_template).input_ids


def continuation_ids(tokenizer, text: str, prompt: list[int], continuation: str) -> list[int]:
    """The token ids of `continuation` after `text`, whose token ids are `prompt`.

    Tokenized alone, it would start with a space under SentencePiece (Zephyr, Llama 2), which is
    not how the model starts an answer.
    """
    ids = prompt_ids(tokenizer, text + continuation)
    if ids[: len(prompt)] == prompt:
        return ids[len(prompt) :]
    return tokenizer(continuation, add_special_tokens=False).input_ids
