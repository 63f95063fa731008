"""Several texts at once, each as it is written: `python together.py [MODEL]`."""

import asyncio
import sys

from hybrid import AsyncLLM, SamplingParams

PROMPTS = ["Once upon a time", "One winter morning", "The old fisherman said"]


async def write(llm: AsyncLLM, prompt: str) -> None:
    text = prompt
    async for delta in llm.generate(prompt, SamplingParams(max_tokens=40, seed=1)):
        text += delta.outputs[0].text
    print(text)


async def main(model: str | None) -> None:
    async with AsyncLLM(model, max_model_len=256, max_num_seqs=len(PROMPTS)) as llm:
        await asyncio.gather(*(write(llm, prompt) for prompt in PROMPTS))
        stats = llm.stats()
    print(f"{stats.generation_tokens_total} tokens in {stats.decode_steps_total} steps")


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else None))
