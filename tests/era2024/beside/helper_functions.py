"""What a notebook of 2024 imports from a file beside it: our own code."""


def modify_tokenizer(tokenizer, pad_token="<|pad|>"):
    """Give the tokenizer a padding token of its own."""
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": pad_token})
    return tokenizer


def modify_model(model, tokenizer):
    """Make room for new tokens, and tell the model its padding token."""
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def generate(model, tokenizer, sentence, max_new_tokens=4):
    """The prompt with its answer, special tokens and all."""
    chat = [{"role": "user", "content": sentence}]
    prompt = tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens)
    return tokenizer.decode(output[0])


def find_max_batch_size(trainer, largest=4):
    """Double the batch until a forward and a backward pass of ones fail."""
    import torch

    size = 1
    while size < largest:
        ids = torch.ones(size * 2, 16, dtype=torch.long)
        ids = ids.to(trainer.model.device)
        try:
            trainer.model(input_ids=ids, labels=ids).loss.backward()
        except RuntimeError:
            break
        size *= 2
    return size
