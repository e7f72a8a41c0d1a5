#!/usr/bin/env python3
"""Make a tiny Llama out of nothing, to prove that serving works where no model can be downloaded.

make_tiny_llama.py --out DIR            make it, unless DIR holds it already
make_tiny_llama.py --out DIR --check    compare DIR with its manifest (needs nothing but Python)

The weights are random and the answers are nonsense. The same wheels give the same bytes on every host.
Prints one JSON object on stdout; exit codes: 0 as it should be, 1 not so. Making needs torch, transformers
and tokenizers; Python 3.9 or later.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile

MANIFEST = "manifest.json"
MADE_BY = (
    "make_tiny_llama.py: a Llama of random weights and a tokenizer trained on one page of text. "
    "Its answers are nonsense; it exists to check that serving works, and for nothing else."
)
# Part of the manifest: a change of any of these makes a new model.
RECIPE = {
    "version": 1,
    "seed": 20240229,
    "vocab_size": 896,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    # 8 heads of 32, all with their own keys and values: divides for tensor parallel of 1, 2, 4 and 8.
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    # Short, so that "the prompt is too long" is easy to provoke.
    "max_position_embeddings": 2048,
}
SPECIAL = ["<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEXT = """
A server wakes before anyone has asked it for anything. The fans rise, the memory is counted, and one small
program after another says that it is ready. Somewhere in the rack a light turns from amber to green, and
the operator, who has seen it many times, still looks up to make sure.

What is a cluster? It is a number of machines that have agreed to be one. One of them keeps the list of all
the others, and the others tell it now and then that they are still there. When one of them falls silent the
list grows shorter, the work that it held is given to its neighbours, and whoever asked a question gets an
answer a little later than usual. If all goes well nobody ever learns that something went wrong.

A model is a large table of numbers together with a rule for using them. Somebody writes a sentence; the
sentence is cut into pieces; every piece is given a number; the numbers go through the table, layer by layer,
and at the end there stands the next piece, and then the next, until the answer says that it is over. The
table of this model was filled by throwing dice. It has learned nothing, it knows nothing, and what it says
means nothing at all. But it says it quickly, one token after the other, and that is all we want to see.

How many requests can be answered at the same time? That depends on the memory that is left when the weights
have found their place. Each conversation needs room for what has been said so far. When the room is full,
new questions wait in a queue, first come, first served, and when the queue grows too long another replica
is started, on the same host or on the next one. When the evening comes and the questions grow rare, the
replicas are stopped again, but not before each of them has finished its last sentence.

The head of the cluster should be a quiet place. It serves no model and needs no accelerator. It holds the
list, the plan and the token; it takes the new plan when there is one, compares it with what is running, and
changes only what differs. A plan that is the same as yesterday changes nothing, however often it is applied.

"Good morning," said the first probe. "Are you there?" "I am here," said the service, "and so are my three
replicas, each on its own host." "Then count to ten for me." "One, two, three, four, five, six, seven, eight,
nine, ten." "And what is the capital of France?" "I do not know; I am made of random numbers." "That is the
right answer," said the probe, wrote 200 into its report, and went away to ask somebody else.

Keys: alpha, beta, gamma, delta. Values: 0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048. Paths: /etc,
/var/lib, /opt, /home, /tmp. Words of a log: info, warning, error, started, stopped, healthy, unhealthy,
pending, running, drained, timeout, retry, done. {"status": "ok", "items": [1, 2, 3], "next": null}
"""


class Problem(Exception):
    """It cannot be done."""


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def digests_of(folder):
    found = {}
    for base, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(base, name)
            relative = os.path.relpath(path, folder)
            if relative != MANIFEST:
                found[relative] = sha256_of(path)
    return found


def digest_of(files):
    """One digest for the whole model."""
    text = "".join("%s  %s\n" % (files[name], name) for name in sorted(files))
    return hashlib.sha256(text.encode()).hexdigest()


def differences(folder):
    """What is wrong with the folder, as lines; none when it holds the model of this recipe, intact."""
    try:
        with open(os.path.join(folder, MANIFEST), encoding="utf-8") as handle:
            manifest = json.load(handle)
        wanted, recipe = manifest["files"], manifest["recipe"]
    except FileNotFoundError:
        return ["%s has no %s" % (folder, MANIFEST)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return ["the manifest in %s cannot be read: %r" % (folder, error)]
    lines = []
    if recipe != RECIPE:
        lines.append("it was made by another recipe")
    have = digests_of(folder)
    lines += ["%s is missing" % name for name in sorted(set(wanted) - set(have))]
    lines += ["%s is not in the manifest" % name for name in sorted(set(have) - set(wanted))]
    lines += ["%s has changed" % name for name in sorted(wanted) if name in have and have[name] != wanted[name]]
    return lines


def make_tokenizer(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=RECIPE["vocab_size"],
        special_tokens=SPECIAL,
        # All 256 bytes, so that every text in every language has tokens.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer=trainer)
    if tokenizer.get_vocab_size() != RECIPE["vocab_size"]:
        raise Problem("the text gave %d tokens, not %d" % (tokenizer.get_vocab_size(), RECIPE["vocab_size"]))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|begin|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[3:],
        model_max_length=RECIPE["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def make_model(folder):
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(RECIPE["seed"])
    torch.set_num_threads(1)  # one order of operations, whatever the host
    config = LlamaConfig(
        vocab_size=RECIPE["vocab_size"],
        hidden_size=RECIPE["hidden_size"],
        intermediate_size=RECIPE["intermediate_size"],
        num_hidden_layers=RECIPE["num_hidden_layers"],
        num_attention_heads=RECIPE["num_attention_heads"],
        num_key_value_heads=RECIPE["num_key_value_heads"],
        max_position_embeddings=RECIPE["max_position_embeddings"],
        pad_token_id=SPECIAL.index("<|pad|>"),
        bos_token_id=SPECIAL.index("<|begin|>"),
        eos_token_id=SPECIAL.index("<|end|>"),
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )
    model.save_pretrained(folder)


def quiet():
    """Nothing may be fetched and nobody told; stdout belongs to the answer."""
    os.environ.update(
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        TRANSFORMERS_VERBOSITY="error",
        TOKENIZERS_PARALLELISM="false",
    )


def make(out):
    parent = os.path.dirname(os.path.abspath(out))
    os.makedirs(parent, exist_ok=True)
    quiet()
    # Beside the target, so that the rename stays within one file system and is atomic.
    work = tempfile.mkdtemp(prefix=".%s." % os.path.basename(out), dir=parent)
    try:
        make_tokenizer(work)
        make_model(work)
        files = digests_of(work)
        for name in files:
            os.chmod(os.path.join(work, name), 0o644)
        with open(os.path.join(work, MANIFEST), "w", encoding="utf-8") as handle:
            manifest = {"made_by": MADE_BY, "recipe": RECIPE, "digest": digest_of(files), "files": files}
            json.dump(manifest, handle, indent=2, sort_keys=True)
            handle.write("\n")
        os.chmod(os.path.join(work, MANIFEST), 0o644)
        os.chmod(work, 0o755)
        replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return digest_of(files)


def replace(new, out):
    """Put the folder in its place. What stood there is moved away first: a rename cannot fall on a full one."""
    old = None
    if os.path.lexists(out):
        old = tempfile.mkdtemp(prefix=".%s.old." % os.path.basename(out), dir=os.path.dirname(new))
        os.rename(out, os.path.join(old, "was"))
    os.rename(new, out)
    if old:
        shutil.rmtree(old, ignore_errors=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make a tiny Llama of random weights, or check one.")
    parser.add_argument("--out", required=True, metavar="DIR", help="the model's folder")
    parser.add_argument("--check", action="store_true", help="only compare the folder with its manifest")
    wanted = parser.parse_args(argv)
    out = os.path.abspath(wanted.out)
    answer = {"changed": False, "path": out, "made_by": MADE_BY}
    wrong = differences(out)
    if not wrong:
        answer.update(ok=True, digest=digest_of(digests_of(out)))
    elif wanted.check:
        answer.update(ok=False, differences=wrong)
    elif os.path.isdir(out) and os.listdir(out) and not os.path.exists(os.path.join(out, MANIFEST)):
        # Never throw away somebody's weights because of a wrong path.
        answer.update(ok=False, differences=["%s holds something that was not made here" % out])
    else:
        try:
            answer.update(changed=True, ok=True, digest=make(out))
        except (ImportError, OSError, Problem) as error:
            answer.update(changed=False, ok=False, differences=["cannot make the model: %s" % error])
    print(json.dumps(answer))
    return 0 if answer["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
