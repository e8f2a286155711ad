"""Pages: none belongs to two that differ, none is lost, what is known is what it says."""

import random

from bigmac_jax.inference.pages import Allocation, PageAllocator


def test_equal_beginnings_share_pages() -> None:
    pages = PageAllocator(8, 4)
    first = pages.allocate(list(range(10)), 12)
    assert first and first.cached == 0 and len(first.pages) == 3 and pages.in_use == 3
    pages.share(first, range(10))
    second = pages.allocate([*range(8), 99], 12)
    assert second and second.cached == 8 and second.pages[:2] == first.pages[:2] and second.pages[2] != first.pages[2]
    assert pages.in_use == 4
    third = pages.allocate(list(range(8)), 8)  # its last token has to be computed
    assert third and third.cached == 4
    for lease in (first, second, third):
        pages.free(lease)
    assert pages.in_use == 0 and pages.available == 8
    again = pages.allocate(list(range(10)), 10)
    assert again and again.cached == 8


def test_too_few_pages_change_nothing() -> None:
    pages = PageAllocator(4, 2)
    held = pages.allocate([1, 2, 3], 6)
    assert held and pages.allocate([1], 4) is None and pages.available == 1
    pages.share(held, [1, 2, 3])
    pages.free(held)
    assert pages.allocate([1, 2, 3], 10) is None  # the known page doesn't count twice
    assert pages.allocate([1, 2, 3], 8)


def test_the_page_that_was_used_longest_ago_goes_first() -> None:
    pages = PageAllocator(3, 2)
    for tokens in ([1, 1], [2, 2], [3, 3]):
        lease = pages.allocate([*tokens], 2)
        assert lease
        pages.share(lease, tokens)
        pages.free(lease)
    assert len(pages.find_prefix([1, 1, 0])) == 1
    lease = pages.allocate([1, 1, 0], 2)  # used again
    assert lease
    pages.free(lease)
    assert pages.allocate([9], 2)
    assert [len(pages.find_prefix([v, v, 0])) for v in (1, 2, 3)] == [1, 0, 1]


def test_what_follows_a_page_that_is_there_twice_stays_unknown() -> None:
    """Its place may be another's later, and what followed it would be found behind that."""
    pages = PageAllocator(8, 2)
    first, second = (pages.allocate([1, 1, 2, 2, 9], 5) for _ in range(2))
    assert first and second
    pages.share(first, [1, 1, 2, 2, 9])
    pages.share(second, [1, 1, 2, 2, 9])
    place = second.pages[0]
    pages.free(second)
    other = pages.allocate([3, 3, 9], 3)
    assert other and place == other.pages[0]
    pages.share(other, [3, 3, 9])
    assert pages.find_prefix([3, 3, 2, 2, 9]) == [place] and pages.find_prefix([1, 1, 2, 2, 9]) == first.pages[:2]


def test_random_use() -> None:
    """Of each page the tokens up to its end are written down beside: what it holds depends on all of them."""
    for seed in range(20):
        draw, number = random.Random(seed), (12, 40)[seed % 2]
        pages = PageAllocator(number, 2)
        content: dict[int, list[int]] = {}
        held: list[tuple[Allocation, list[int]]] = []
        for _ in range(1000):
            if held and draw.random() < 0.3:  # it has read more, what another may have read meanwhile
                lease, tokens = draw.choice(held)
                pages.share(lease, tokens)
            elif held and draw.random() < 0.5:
                lease, tokens = held.pop(draw.randrange(len(held)))
                for i, page in enumerate(lease.pages[: len(tokens) // 2]):
                    assert content[page] == tokens[: 2 * i + 2]
                pages.free(lease)
            else:
                tokens = [draw.randrange(2) for _ in range(draw.randint(1, 9))]
                begun = pages.allocate(tokens, len(tokens) + draw.randrange(3))
                if begun is None:
                    continue
                assert begun.cached < len(tokens)
                for i, page in enumerate(begun.pages[: begun.cached // 2]):
                    assert content[page] == tokens[: 2 * i + 2]
                for i in range(begun.cached // 2, len(begun.pages)):
                    content[begun.pages[i]] = tokens[: 2 * i + 2]
                pages.share(begun, tokens[: draw.randint(begun.cached, len(tokens))])
                held.append((begun, tokens))
            users = {page for lease, _ in held for page in lease.pages}
            assert pages.in_use == len(users) and pages.in_use + pages.available == number
        for lease, _ in held:
            pages.free(lease)
        assert pages.available == number
        assert len(pages._by_key) == len(pages._key_of) <= number
