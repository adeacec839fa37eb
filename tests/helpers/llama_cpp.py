"""Run a GGUF file in llama.cpp, in a separate process, because a file that llama.cpp refuses ends the process."""

import json
import sys
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.programs import run_program

SCRIPT = """
import json, sys, urllib.request
import xllamacpp

request = json.loads(sys.stdin.read())
params = xllamacpp.CommonParams()
params.model.path = request["model"]
params.n_ctx = 64
params.n_parallel = 1
params.warmup = False
params.fit_params = False
params.n_gpu_layers = 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
# The reference keeps its keys and values in full precision.
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)


def post(path, **body):
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(server.listening_address + path, data, headers)) as answer:
        return json.loads(answer.read())


answers = []
for prompt in request["prompts"]:
    answer = post(
        "/completion", prompt=prompt, n_predict=request["steps"], temperature=0.0, n_probs=1, ignore_eos=True,
        cache_prompt=False, return_tokens=True, samplers=["temperature"],
    )
    tops = [step["top_logprobs"][0] for step in answer["completion_probabilities"]]
    answers.append({"tokens": answer["tokens"], "top": [(top["id"], top["logprob"]) for top in tops]})
ids = [post("/tokenize", content=text, add_special=True)["tokens"] for text in request["texts"]]
print("ANSWER" + json.dumps({"answers": answers, "ids": ids}), flush=True)
import os
os._exit(0)
"""


@dataclass(frozen=True)
class Continuation:
    """Greedy tokens after one prompt, and the likeliest token at each step with its log-probability."""

    tokens: list[int]
    top: list[tuple[int, float]]


def run_gguf(
    path: Path, prompts: list[list[int]], steps: int, texts: list[str] | None = None
) -> tuple[list[Continuation], list[list[int]]]:
    """Greedy continuations of the prompts, and the token ids of the texts, special tokens included."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (pip install xllamacpp)")
    request = {"model": str(path), "prompts": prompts, "steps": steps, "texts": texts or []}
    done = run_program([sys.executable, "-c", SCRIPT], given=json.dumps(request))
    found = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert found, f"llama.cpp ended with {done.returncode}: {done.stderr[-3000:]}"
    answer = json.loads(found[0].removeprefix("ANSWER"))
    return [Continuation(**each) for each in answer["answers"]], answer["ids"]


def ascii_tokenizer(tokens: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of three special tokens and pairs of letters, so that any generated ids are valid text."""
    pairs = ("".join(pair) for pair in product(ascii_lowercase, repeat=2))
    vocabulary = {text: index for index, text in enumerate(("<unk>", "<s>", "</s>", *islice(pairs, tokens - 3)))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
