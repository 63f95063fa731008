"""Complete several prompts. Usage: python generate.py [MODEL.gguf]"""

import sys

from hybrid import LLM, SamplingParams

prompts = ["Once upon a time", "The old fisherman said"]
params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=40, seed=1)

with LLM(sys.argv[1] if len(sys.argv) > 1 else "demo") as llm:
    for output in llm.generate(prompts, params):
        completion = output.outputs[0]
        print(f"{output.prompt}{completion.text}")
        print(f"  [{len(completion.token_ids)} tokens, {completion.finish_reason}]")
