"""A conversation of two turns. Usage: python chat.py [MODEL.gguf]"""

import sys

from hybrid import LLM, SamplingParams

questions = ["Tell me a story about a fox.", "What happened next?"]
params = SamplingParams(temperature=0.7, max_tokens=60, seed=1)

with LLM(sys.argv[1] if len(sys.argv) > 1 else "demo") as llm:
    messages = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        (output,) = llm.chat(messages, params)
        answer = output.outputs[0].text
        messages.append({"role": "assistant", "content": answer})
        print(f"> {question}\n{answer}\n")
