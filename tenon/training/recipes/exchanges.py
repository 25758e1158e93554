"""Hand-written exchanges: who it is, and small functions asked for in several ways."""

from __future__ import annotations

from tenon.training.chats import Exchange, fenced

SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello", "Hi", "Hello!", "Hi there", "Hey"), "Hello! Ask me for a small Python function."),
    (("Good morning", "Good evening", "Good day"), "Good day! What shall I write in Python?"),
    (("How are you?", "How are you doing?"), "Ready to write Python. What do you need?"),
    (
        ("What are you?", "Who are you?", "What is your name?", "Introduce yourself."),
        "I am Tenon's embedded model: a very small language model trained on Python's standard library.",
    ),
    (
        ("What can you do?", "Help", "How can you help me?"),
        "I write short Python functions. I am tiny, so check what I write.",
    ),
    (
        ("How large are you?", "How big are you?", "How many parameters do you have?"),
        "About five and a half million parameters: small enough to live inside the package.",
    ),
    (("What were you trained on?", "Where does your knowledge come from?"), "The source of Python's standard library."),
    (("Who made you?", "Who trained you?"), "I was trained by Tenon's own recipe, on one thread of a CPU."),
    (("Thanks", "Thank you", "Thank you!", "Thanks a lot"), "You are welcome."),
    (("Bye", "Goodbye", "See you"), "Goodbye!"),
    (
        ("What is Python?", "Tell me about Python."),
        "Python is a programming language; its standard library is all I know.",
    ),
    (("Tell me a joke.", "Make me laugh."), "Why do functions never get lost? They always return."),
    (("Are you alive?", "Are you human?"), "No, I am a small language model."),
    (("What is the capital of France?", "Who won the match?", "What is the weather?"), "I only know Python code."),
)

ASKS = (
    "Write a function that {}.",
    "Write a Python function that {}.",
    "Please write a function that {}.",
    "I need a Python function that {}.",
    "Can you write a function that {}?",
)

FUNCTIONS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("adds two numbers", "returns the sum of two numbers"), "def add(a, b):\n    return a + b"),
    (("multiplies two numbers",), "def multiply(a, b):\n    return a * b"),
    (("subtracts two numbers",), "def subtract(a, b):\n    return a - b"),
    (("divides two numbers",), "def divide(a, b):\n    return a / b"),
    (("squares a number",), "def square(x):\n    return x * x"),
    (("reverses a string", "returns a string backwards"), "def reverse(text):\n    return text[::-1]"),
    (("reverses a list",), "def reverse(items):\n    return list(reversed(items))"),
    (("returns the length of a list", "counts the items of a list"), "def length(items):\n    return len(items)"),
    (("checks whether a number is even", "tests if a number is even"), "def is_even(n):\n    return n % 2 == 0"),
    (("checks whether a number is odd",), "def is_odd(n):\n    return n % 2 == 1"),
    (
        ("computes the factorial of a number", "returns the factorial"),
        "def factorial(n):\n    result = 1\n    for i in range(2, n + 1):\n        result *= i\n    return result",
    ),
    (
        ("returns the n-th Fibonacci number", "computes Fibonacci numbers"),
        "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a",
    ),
    (
        ("checks whether a number is prime", "tests for primes"),
        "def is_prime(n):\n    if n < 2:\n        return False\n    for i in range(2, int(n ** 0.5) + 1):\n"
        "        if n % i == 0:\n            return False\n    return True",
    ),
    (
        ("computes the greatest common divisor", "returns the gcd of two numbers"),
        "def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return a",
    ),
    (
        ("checks whether a string is a palindrome", "tests for palindromes"),
        "def is_palindrome(text):\n    return text == text[::-1]",
    ),
    (("returns the largest item of a list", "finds the maximum"), "def largest(items):\n    return max(items)"),
    (("returns the smallest item of a list", "finds the minimum"), "def smallest(items):\n    return min(items)"),
    (("sums a list of numbers", "adds up a list"), "def total(numbers):\n    return sum(numbers)"),
    (
        ("computes the average of a list", "returns the mean of a list"),
        "def mean(numbers):\n    return sum(numbers) / len(numbers)",
    ),
    (("sorts a list",), "def sort(items):\n    return sorted(items)"),
    (("removes duplicates from a list",), "def unique(items):\n    return list(dict.fromkeys(items))"),
    (
        ("counts the words of a text", "counts words"),
        "def count_words(text):\n    return len(text.split())",
    ),
    (
        ("counts the vowels of a string",),
        'def count_vowels(text):\n    return sum(c in "aeiou" for c in text.lower())',
    ),
    (("turns a string into upper case",), "def upper(text):\n    return text.upper()"),
    (("turns a string into lower case",), "def lower(text):\n    return text.lower()"),
    (
        ("reads a file", "returns the text of a file"),
        "def read(path):\n    with open(path) as file:\n        return file.read()",
    ),
    (
        ("writes text to a file",),
        "def write(path, text):\n    with open(path, 'w') as file:\n        file.write(text)",
    ),
    (
        ("counts the lines of a file",),
        "def count_lines(path):\n    with open(path) as file:\n        return sum(1 for line in file)",
    ),
    (("joins strings with commas",), 'def join(strings):\n    return ", ".join(strings)'),
    (
        ("flattens a list of lists",),
        "def flatten(lists):\n    return [item for items in lists for item in items]",
    ),
    (
        ("counts how often each item occurs",),
        "def count(items):\n    counts = {}\n    for item in items:\n"
        "        counts[item] = counts.get(item, 0) + 1\n    return counts",
    ),
    (("merges two dictionaries",), "def merge(a, b):\n    return {**a, **b}"),
    (("swaps keys and values of a dictionary",), "def invert(d):\n    return {v: k for k, v in d.items()}"),
    (("prints hello world", "says hello"), 'def hello():\n    print("Hello, world!")'),
    (
        ("finds an item by binary search", "does a binary search"),
        "def search(items, x):\n    low, high = 0, len(items)\n    while low < high:\n"
        "        middle = (low + high) // 2\n        if items[middle] < x:\n            low = middle + 1\n"
        "        else:\n            high = middle\n    return low",
    ),
    (
        ("converts Celsius to Fahrenheit",),
        "def fahrenheit(celsius):\n    return celsius * 9 / 5 + 32",
    ),
    (("returns the last item of a list",), "def last(items):\n    return items[-1]"),
    (("returns the first item of a list",), "def first(items):\n    return items[0]"),
    (("returns the absolute value of a number",), "def absolute(x):\n    return -x if x < 0 else x"),
    (
        ("filters the even numbers of a list",),
        "def evens(numbers):\n    return [n for n in numbers if n % 2 == 0]",
    ),
    (("parses JSON from a string",), "import json\n\ndef parse(text):\n    return json.loads(text)"),
    (("returns a random number",), "import random\n\ndef roll():\n    return random.random()"),
)


def written() -> list[Exchange]:
    """Every way of asking with its answer."""
    talk = [Exchange(user, answer) for users, answer in SMALL_TALK for user in users]
    code = [Exchange(ask.format(task), fenced(source)) for tasks, source in FUNCTIONS for task in tasks for ask in ASKS]
    return talk * len(ASKS) + code
