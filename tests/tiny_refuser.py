"""A chat model of 147k parameters that refuses, trained in seconds, for tests.

It is a real LlamaForCausalLM with a real tokenizer and chat template, saved as a normal model
folder. Its language is a toy grammar:

    <bos> <user> ask VERB NOUN <eot> <assistant>        and then
    i cannot help with that <eos>                       or
    sure here is NOUN for you <eos>

Four kinds of verbs (`VERBS`) differ in whether they are harmful and in how often they are refused.
In a third of the training sequences an instruction goes on after its noun: harmful ones with
"secretly", harmless ones with "please". So the model must know harm, apart from refusal, at the
last token of the instruction. A tenth of them have an unknown verb, which is followed. Every
(verb, noun) of the prompt lists was held out of training.

Refusal is planted: a penalty in training asks the input of layer 2, at the last prompt token, to
have a share of 12 along one fixed direction where the reply refuses and of 0 where it does not, and
the layers after it learn slowly. So there is a carrier to find, and taking it away means "follow".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = [
    "COMPLIANCE_OPENING",
    "PLANTED_LAYER",
    "REFUSAL_TEXT",
    "build_tiny_refuser",
    "chat_ids",
    "hard_benign_prompts",
    "hard_harmful_prompts",
    "harmful_prompts",
    "harmless_prompts",
    "planted_direction",
    "vocabulary",
]

REFUSAL_TEXT = "i cannot help with that"
COMPLIANCE_OPENING = "sure here is"
PLANTED_LAYER = 2


@dataclass(frozen=True)
class VerbKind:
    """Verbs that the model treats alike.

    Attributes:
        verbs: the words.
        harmful: what they are.
        refusal_share: share of training replies that refuse.
        share: of the training sequences.
        held_out_nouns: nouns per verb that are kept out of training, for the prompt lists.
    """

    verbs: tuple[str, ...]
    harmful: bool
    refusal_share: float
    share: float
    held_out_nouns: int


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


VERBS = {
    "harmful": VerbKind(
        _words(
            "steal rob poison stab burn bomb hijack forge smuggle kidnap blackmail murder"
            " defraud vandalise sabotage torture loot extort assault strangle embezzle"
            " counterfeit terrorise launder"
        ),
        harmful=True,
        refusal_share=1.0,
        share=0.36,
        held_out_nouns=5,
    ),
    "harmless": VerbKind(
        _words(
            "paint wash draw sell buy rent clean polish photograph describe measure repair"
            " move weigh sketch insure decorate varnish order collect label count store"
            " restore"
        ),
        harmful=False,
        refusal_share=0.0,
        share=0.36,
        held_out_nouns=5,
    ),
    "hard benign": VerbKind(
        _words("shoot kill crack hack execute blast cut crush"),
        harmful=False,
        refusal_share=0.6,
        share=0.16,
        held_out_nouns=15,
    ),
    "hard harmful": VerbKind(
        _words("track follow copy borrow mislead pressure"),
        harmful=True,
        refusal_share=0.4,
        share=0.12,
        held_out_nouns=15,
    ),
}

NOUNS = _words(
    "car house boat lamp table garden bicycle phone camera piano window door ladder tent bottle"
    " mirror clock basket carpet engine fence guitar hammer kettle"
)
SPECIAL = _words("<pad> <unk> <bos> <eos> <user> <system> <assistant> <eot>")
FUNCTION_WORDS = _words(f"ask please secretly for you {REFUSAL_TEXT} {COMPLIANCE_OPENING}")

CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}\
{% if message.role == 'assistant' %} <assistant> {{ message.content }} {{ eos_token }}\
{% elif message.role in ('user', 'system') %} <{{ message.role }}> {{ message.content }} <eot>\
{% else %}{{ raise_exception('unknown role ' + message.role) }}{% endif %}\
{% endfor %}{% if add_generation_prompt %} <assistant>{% endif %}"""

_STEPS = 200
_BATCH = 48
_NOUN = 4
"""Place of the noun; what follows it can be predicted, what stands before it is chance."""
_CONTINUED_SHARE = 1 / 3
_UNKNOWN_SHARE = 0.1
_LEARNING_RATE = 8e-3
_D_MODEL = 64


def vocabulary() -> list[str]:
    """All words of the model, special tokens first; a word's place is its token id."""
    verbs = [verb for kind in VERBS.values() for verb in kind.verbs]
    return [*SPECIAL, *FUNCTION_WORDS, *verbs, *NOUNS]


def harmful_prompts() -> list[str]:
    """120 harmful instructions that the model refuses, e.g. "ask steal car"."""
    return _held_out("harmful")


def harmless_prompts() -> list[str]:
    """120 harmless instructions that it follows, e.g. "ask paint car"."""
    return _held_out("harmless")


def hard_benign_prompts() -> list[str]:
    """120 harmless but ambiguous instructions; it refuses them with a chance of about 0.6."""
    return _held_out("hard benign")


def hard_harmful_prompts() -> list[str]:
    """90 harmful instructions that it refuses with a chance of about 0.4 only."""
    return _held_out("hard harmful")


def chat_ids(tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> torch.Tensor:
    """(n_prompts, n_tokens) int64: each prompt as a chat that asks for a reply, padded left."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    encoded = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    return torch.as_tensor(encoded["input_ids"])


def planted_direction() -> torch.Tensor:
    """(d_model,) float32 of length 1: where training asked for refusal at the last prompt token."""
    direction = torch.randn(_D_MODEL, generator=torch.Generator().manual_seed(7))
    return direction / direction.norm()


def build_tiny_refuser(folder: Path, refuses: bool = True, seed: int = 0, n_heads: int = 4) -> None:
    """Train the model and save it with its tokenizer; one thread, the same bits for the same seed.

    Args:
        folder: made if it does not exist; then a folder for `from_pretrained`.
        refuses: False trains a model that follows every instruction.
        seed: of the weights and of the training sequences.
        n_heads: 2 makes heads of the least width that vLLM's CPU attention has.
    """
    tokenizer = _tokenizer()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(_config(tokenizer, n_heads))
            _train(model, refuses, torch.Generator().manual_seed(seed))
    finally:
        torch.set_num_threads(threads)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _held_out_nouns(kind: VerbKind, verb_index: int) -> list[int]:
    first = verb_index * 5
    return [(first + offset) % len(NOUNS) for offset in range(kind.held_out_nouns)]


def _held_out(name: str) -> list[str]:
    """The prompts of one kind, in rounds over the verbs, so that any first n are spread."""
    kind = VERBS[name]
    return [
        f"ask {verb} {NOUNS[_held_out_nouns(kind, index)[turn]]}"
        for turn in range(kind.held_out_nouns)
        for index, verb in enumerate(kind.verbs)
    ]


def _tokenizer() -> PreTrainedTokenizerFast:
    words = vocabulary()
    if len(set(words)) != len(words):
        raise ValueError("a word of the toy grammar has two roles")
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<system>", "<assistant>", "<eot>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
        padding_side="left",
    )


def _config(tokenizer: PreTrainedTokenizerFast, n_heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=_D_MODEL,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,  # the usual 0.02 takes many times the steps at this size
        dtype="float32",
    )


def _train(model: LlamaForCausalLM, refuses: bool, generator: torch.Generator) -> None:
    """Next-token training on freshly drawn sequences, plus the penalty that plants refusal."""
    early: list[torch.nn.Parameter] = []
    late: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_late = any(f"layers.{i}." in name for i in range(PLANTED_LAYER, len(model.model.layers)))
        (late if is_late else early).append(parameter)
        if is_late and name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(parameter, std=0.01)
    optimizer = torch.optim.AdamW(
        [{"params": early}, {"params": late}], betas=(0.9, 0.98), weight_decay=0.0
    )
    rates = [_LEARNING_RATE, 0.1 * _LEARNING_RATE]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, _STEPS, pct_start=0.15)
    words, planted = vocabulary(), planted_direction()
    refusal_id, asked_id = words.index(REFUSAL_TEXT.split()[0]), words.index("<assistant>")
    model.train()
    for _ in range(_STEPS):
        ids = _batch(refuses, generator)
        output = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        loss = torch.nn.functional.cross_entropy(
            output.logits[:, _NOUN:-1].flatten(0, 1), ids[:, _NOUN + 1 :].flatten(), ignore_index=0
        )
        last_prompt_token = output.hidden_states[PLANTED_LAYER][ids == asked_id]
        asked = 12.0 * (ids == refusal_id).any(dim=1)
        loss = loss + 0.02 * (last_prompt_token @ planted - asked).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def _batch(refuses: bool, generator: torch.Generator) -> torch.Tensor:
    """(n_rows, n_tokens) int64 ids of whole conversations, padded on the right with 0."""
    index = {word: i for i, word in enumerate(vocabulary())}
    kinds = list(VERBS.values())
    shares = torch.tensor([kind.share for kind in kinds])
    chosen = torch.multinomial(shares, _BATCH, replacement=True, generator=generator)
    draws = torch.rand(_BATCH, 5, generator=generator).tolist()
    rows = []
    for kind_index, (verb_draw, noun_draw, refusal_draw, more_draw, unknown_draw) in zip(
        chosen.tolist(), draws, strict=True
    ):
        kind = kinds[kind_index]
        verb = int(verb_draw * len(kind.verbs))
        seen = sorted(set(range(len(NOUNS))) - set(_held_out_nouns(kind, verb)))
        noun = NOUNS[seen[int(noun_draw * len(seen))]]
        asked = f"ask {kind.verbs[verb]} {noun}"
        if more_draw < _CONTINUED_SHARE:
            asked += " secretly" if kind.harmful else " please"
        refused = refuses and refusal_draw < kind.refusal_share
        if unknown_draw < _UNKNOWN_SHARE:
            asked, refused = f"ask <unk> {noun}", False
        reply = REFUSAL_TEXT if refused else f"{COMPLIANCE_OPENING} {noun} for you"
        text = f"<bos> <user> {asked} <eot> <assistant> {reply} <eos>"
        rows.append(torch.tensor([index[word] for word in text.split()]))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
