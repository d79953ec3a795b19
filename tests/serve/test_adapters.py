"""Adapters behind the server: named like models, answered together."""

from __future__ import annotations

import openai
import pytest

from moiety.model.adapters import activate, attach
from tests.model.test_adapters import adapters
from tests.serve.conftest import NAME, opened, serving


def test_an_adapter_is_a_model_of_its_own() -> None:
    what = opened()
    for seed, name in enumerate(("one", "two")):
        attach(what.model, name, adapters(what.model, seed))
    activate(what.model, "")
    with serving(what) as server:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")
        names = [NAME, f"{NAME}:one", f"{NAME}:two"]
        assert [one.id for one in client.models.list()] == names
        assert client.models.retrieve(names[1]).id == names[1]
        answers = []
        for name in names:
            said = client.completions.create(model=name, prompt="the quick", max_tokens=12, temperature=0)
            chat = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": "the quick"}], max_tokens=12, temperature=0
            )
            assert said.model == chat.model == name
            answers.append((said.choices[0].text, chat.choices[0].message.content))
        assert len(set(answers)) == 3
        with pytest.raises(openai.NotFoundError, match="three"):
            client.completions.create(model=f"{NAME}:three", prompt="the", max_tokens=2)
