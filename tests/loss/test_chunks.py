"""The sizes of the loss's chunks follow the formula, and the chunks cover all tokens."""

from dataclasses import replace

from bigmix.loss.chunks import LossShape, chunk_tokens, even_slices


def test_chunks_take_each_token_once_and_are_never_too_large():
    for tokens in [0, 1, 15, 16, 17, 100, 129, 1000]:
        for most in (16, 20, 64, 1000):
            slices = even_slices(tokens, most)
            assert [i for s in slices for i in range(s.start, s.stop)] == list(range(tokens))
            assert all(s.stop - s.start <= most for s in slices)
            assert len(slices) <= -(-tokens // (most - most % 16))


def test_a_chunk_is_an_eighth_of_the_gradients_or_what_is_given():
    sizes = LossShape(
        num_tokens=4096,
        hidden_size=512,
        vocabulary_size=128256,
        hidden_bytes=4,
        logit_bytes=4,
        device_type="cpu",
        device_bytes=0,
    )
    gradients = 4 * 512 * (128256 + 4096)
    assert chunk_tokens(sizes) == gradients // 8 // (4 * 128256)
    # 8 MiB is never too much.
    small = replace(sizes, hidden_size=64)
    assert chunk_tokens(replace(small, vocabulary_size=32000)) == (8 << 20) // (4 * 32000)
    assert chunk_tokens(replace(small, vocabulary_size=2048)) == 256
    assert chunk_tokens(replace(sizes, hidden_size=4096)) == 256  # more is no faster
    assert chunk_tokens(sizes, 1 << 30) == (1 << 30) // (4 * 128256)
    gpu = replace(sizes, device_type="cuda", device_bytes=80 << 30, hidden_bytes=2)
    assert chunk_tokens(gpu) == (80 << 30) // 64 // (4 * 128256)
    assert chunk_tokens(replace(gpu, vocabulary_size=32000, hidden_size=64)) == 4096
