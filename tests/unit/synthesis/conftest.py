"""Sources."""

import json

import pytest

from tests.support.synthesis import write_images, write_texts


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """texts/, images/ and vqa.jsonl."""
    folder = tmp_path_factory.mktemp("inputs")
    write_texts(folder / "texts")
    write_images(folder / "images")
    with open(folder / "vqa.jsonl", "w") as file:
        for number, path in enumerate(sorted((folder / "images").iterdir())):
            turns = [
                {"from": "human", "value": f"<image>\nWhat is {number}?"},
                {"from": "gpt", "value": f"it {number}"},
            ]
            short = {"question": f"Which is {number}?", "answer": number}
            record = {"conversations": turns} if number % 2 else short
            file.write(json.dumps({"image": path.name, **record}) + "\n")
    return folder
