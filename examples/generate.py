"""Complete two prompts with the embedded model, in this process: python examples/generate.py"""

from tenon import LLM, SamplingParams

PROMPTS = ["def add(a, b):\n", "class Stack:\n    def push(self, item):\n"]


def main() -> None:
    with LLM("embedded") as llm:
        for prompt, answer in zip(
            PROMPTS, llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=48)), strict=True
        ):
            print(prompt + answer.outputs[0].text)
            print(f"# {len(answer.outputs[0].ids)} tokens, ended by {answer.outputs[0].finish_reason}\n")


if __name__ == "__main__":
    main()
