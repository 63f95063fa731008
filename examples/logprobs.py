"""How likely a model finds each token of a text. Usage: python logprobs.py [MODEL.gguf]"""

import math
import sys

from hybrid import LLM, SamplingParams

text = "Once upon a time, a fox lived beside an old mill."
# -1 gives the whole vocabulary at each position, as one float32 array.
params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, logprobs=3)

with LLM(sys.argv[1] if len(sys.argv) > 1 else "demo") as llm:
    (output,) = llm.generate(text, params)

total = 0.0
for token_id, entries in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True):
    if entries is None:  # nothing comes before the first token
        continue
    entry = entries[token_id]
    total += entry.logprob
    print(f"{entry.decoded_token!r:>14}  p = {math.exp(entry.logprob):.4f}  rank {entry.rank}")
print(f"perplexity {math.exp(-total / (len(output.prompt_token_ids) - 1)):.2f}")

print(
    "next:", {e.decoded_token: round(math.exp(e.logprob), 3) for e in output.outputs[0].logprobs[0].values()}
)
