"""Texts of a given form; needs the extra `server`. Usage: python structured.py [MODEL.gguf]"""

import json
import sys

from hybrid import LLM, SamplingParams, StructuredOutputs

animal = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{2,7}$"},
        "kind": {"enum": ["fox", "owl", "heron"]},
        "age": {"type": "integer", "minimum": 1, "maximum": 20},
    },
    "required": ["name", "kind", "age"],
    "additionalProperties": False,
}
forms = {
    "schema": StructuredOutputs(json=animal),
    "expression": StructuredOutputs(regex=r"[0-2]\d:[0-5]\d"),
    "choice": StructuredOutputs(choice=["yes", "no", "perhaps"]),
    "grammar": StructuredOutputs(grammar='start: NUMBER (" + " NUMBER){1,3}\nNUMBER: /[1-9][0-9]?/'),
}

with LLM(sys.argv[1] if len(sys.argv) > 1 else "demo", max_num_seqs=4) as llm:
    params = [SamplingParams(structured_outputs=form, seed=1, max_tokens=100) for form in forms.values()]
    outputs = llm.generate(["Once upon a time"] * len(forms), params, use_tqdm=False)

for name, output in zip(forms, outputs, strict=True):
    print(f"{name:>10}: {output.outputs[0].text}")
print(json.loads(outputs[0].outputs[0].text)["name"], "is an animal")
