"""Print a text while it is written. Usage: python stream.py [MODEL.gguf]"""

import sys

from hybrid import LLM, SamplingParams

prompt = "Once upon a time"
params = SamplingParams(temperature=0.8, min_p=0.05, max_tokens=60, stop=["\n\n"])

with LLM(sys.argv[1] if len(sys.argv) > 1 else "demo") as llm:
    print(prompt, end="", flush=True)
    # Leaving the `with` block ends the request, finished or not.
    with llm.stream(prompt, params) as stream:
        for delta in stream:
            print(delta.outputs[0].text, end="", flush=True)
        metrics = stream.result().metrics
    print(f"\n[first token after {metrics.first_token_s:.2f} s]")
