"""The paper's and the model card's numbers beside ours."""
