"""Make the prompts of the quickstart: requests for code and structured text, from word lists.

    python examples/quickstart/make_prompts.py --output runs/quickstart_data

Writes `prompts.jsonl` and `heldout.jsonl`. Of every word list each eighth word is held out: it
stands in held-out prompts only, and these have no other words, so the two files share the forms and
nothing that is filled in. The same seed gives the same files.
"""

import argparse
import json
import random
import re
from pathlib import Path

FORMS = {
    "Write this as JSON with the keys name, age and city: "
    "{first} {last} is {age} years old and lives in {city}.": 150,
    "Write this as JSON with the keys name, job and city: "
    "{first} {last} works as a {job} in {city}.": 100,
    "Write this as JSON with the keys item, color and price: "
    "The {item} is {color} and costs {price} dollars.": 150,
    "Write a SQL query that selects all rows of the table {table} where the {column} is above "
    "{price}.": 80,
    "Write a SQL query that sorts the rows of the table {table} by {column}.": 60,
    "Write a SQL query that returns the largest {column} in the table {table}.": 60,
    "Write a Python function that {does}.": 60,
    "Show me a short Python function that {does}.": 60,
    "Write a CSS rule that makes all {element} {style}.": 110,
    'Write an HTML page with the title "{title}" and one paragraph.': 50,
    "Write a Markdown table of three {things} with the columns name, {aspect} and price.": 120,
    "Write a short e-mail to {person} to {purpose}.": 160,
}
"""How many prompts for training have each form, at most."""
HELDOUT_PER_FORM = 4

WORDS = {
    "first": "Anna Ben Clara David Emma Felix Grace Hugo Ida Jonas Karin Leo Maria Nils Olga Paul "
    "Rosa Simon Tina Ugo Vera Walter Yara Zoe Adam Bella Carl Diana Erik Fiona Georg Hanna",
    "last": "Berg Castro Dunn Evans Fischer Garcia Hansen Ivanov Jensen Keller Lopez Moreau Novak "
    "Olsen Peters Quinn Rossi Silva Torres Ulrich Vogel Weber Young Ziegler",
    "age": " ".join(map(str, range(19, 75))),
    "city": "Oslo Madrid Paris Rome Berlin Vienna Prague Lisbon Dublin Athens Warsaw Helsinki "
    "Geneva Boston Chicago Denver Seattle Toronto Tokyo Sydney Cairo Lima Mumbai Nairobi",
    "job": "teacher nurse baker lawyer driver farmer painter singer dentist waiter plumber tailor "
    "gardener carpenter librarian mechanic pilot chef cashier writer",
    "item": "chair table lamp sofa shelf mirror carpet clock vase pillow blanket bicycle backpack "
    "jacket umbrella scarf hat kettle teapot bowl bucket ladder suitcase wallet notebook",
    "color": "green blue red yellow black white brown gray orange purple pink silver",
    "price": "12 15 18 20 24 25 30 35 40 45 50 60 75 80 90 120 150 200 250 300 400 500",
    "table": "orders customers products employees students books courses invoices flights hotels "
    "payments tickets movies songs cars houses teachers doctors patients players teams shops",
    "column": "price age salary score weight height rating quantity amount year distance discount "
    "population cost length duration",
    "things": "fruits|vegetables|drinks|desserts|toys|tools|flowers|trees|birds|dogs|cars|phones|"
    "books|games|sports|instruments|cheeses|breads|soups|jackets|shoes|hats|lamps|chairs|bicycles|"
    "boats|cakes|spices|nuts|teas|coffees|watches|bags|cameras|pens|candles",
    "aspect": "color size weight origin taste material age quality",
    "element": "headings|links|paragraphs|buttons|images|tables|lists|labels|inputs|quotes|"
    "footers|headers|menus|titles|captions|forms",
    "style": "blue|red|green|bold|italic|larger|smaller|underlined|centered|gray|white|round|"
    "wider|narrow|invisible|transparent",
    "title": "My garden|My kitchen|Our school|The old bridge|My first trip|Our bakery|"
    "The city library|My favorite books|A day at sea|Our football club|My cat|The art museum|"
    "Summer camp|My bicycle|Our wedding|The music room|My family|A winter walk|Our hotel|"
    "The coffee shop|My travel diary|Our team|The farm|My photos|The night sky|Our recipes|"
    "My new job|The chess club|Our dog|The flower shop|My village|The science fair|My hobbies|"
    "Our history|The small theater|My paintings|The mountain hut|Our neighbors|My homework|"
    "The spring market|Our choir|My running shoes|The lake|My piano lessons|Our boat|The bookshop|"
    "My weekend|Our street|The train station|My grandmother",
    "person": "my landlord|my teacher|my boss|a customer|the bank|my neighbor|the library|"
    "my doctor|a colleague|the school|the hotel|my dentist|a supplier|the airline|my team|"
    "the city office",
    "purpose": "report a broken heater|ask for more time|cancel a meeting|apologize for a mistake|"
    "ask for a new card|confirm an appointment|thank them for their help|ask for a refund|"
    "invite them to lunch|explain a delay|ask for the opening hours|change a booking|"
    "request a copy of a contract|offer a discount|complain about the noise|ask for a day off|"
    "send the new address|ask about a lost parcel|suggest a new date|order more paper|"
    "say that I am ill|ask for directions|praise their good work|remind them of a payment",
    "does": "returns the sum of a list of numbers|counts the vowels in a string|"
    "returns the larger of two numbers|reverses a string|checks whether a number is even|"
    "returns the average of a list|counts the words in a sentence|"
    "returns the smallest number of a list|checks whether a word is a palindrome|"
    "adds two numbers|returns the square of a number|removes the spaces of a string|"
    "returns the first letter of a word|sorts a list of names|multiplies all numbers of a list|"
    "converts miles to kilometers|converts Celsius to Fahrenheit|returns the area of a circle|"
    "returns the length of a string|checks whether a list is empty|returns the last item of a list|"
    "counts the even numbers of a list|returns the longest word of a list|"
    "joins a list of words with commas|prints the numbers from one to ten|"
    "returns the factorial of a number|checks whether a number is prime|"
    "returns the difference of two numbers|removes duplicates from a list|"
    "returns the number of days in a week|counts how often a letter occurs in a word|"
    "returns the area of a rectangle|checks whether a year is a leap year|"
    "returns the middle item of a list|capitalizes every word of a sentence|"
    "returns the absolute value of a number|converts minutes to seconds|"
    "replaces spaces with underscores|returns the sum of the digits of a number|"
    "checks whether a string starts with a letter|doubles every number of a list|"
    "returns the positive numbers of a list|merges two lists|returns the keys of a dictionary|"
    "reads a file and returns its lines|writes a list of names to a file|"
    "returns the second item of a list|greets a person by name|returns the cube of a number|"
    "checks whether two words are equal|counts the lines of a text|"
    "returns the product of two numbers|returns the perimeter of a square|"
    "converts a string to lower case|finds the position of a word in a list|"
    "returns the remainder of a division|flips the sign of a number|"
    "returns the numbers above ten|checks whether a list contains a name|picks a random item",
}
"""What stands for each name in braces: words, or phrases between bars."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart's prompts.")
    parser.add_argument("--output", type=Path, required=True, help="folder for both files")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, held_out in (("prompts.jsonl", False), ("heldout.jsonl", True)):
        lines = map(as_line, prompts(arguments.seed, held_out=held_out))
        (arguments.output / name).write_text("".join(lines), encoding="utf-8")


def as_line(prompt: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": prompt}]}) + "\n"


def prompts(seed: int, *, held_out: bool) -> list[str]:
    """All prompts of one of the two files. Held-out ones have the forms in turn, so that the first
    few have all of them; the others are shuffled."""
    draw = random.Random(f"{seed}/{held_out}")
    made = []
    for form, most in FORMS.items():
        mine = {fill(form, draw, held_out) for _ in range(20 * most)}
        count = min(HELDOUT_PER_FORM if held_out else most, len(mine))
        made.append(draw.sample(sorted(mine), count))
    if held_out:
        return [prompt for turn in zip(*made, strict=True) for prompt in turn]
    everything = [prompt for mine in made for prompt in mine]
    draw.shuffle(everything)
    return everything


def fill(form: str, draw: random.Random, held_out: bool) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: draw.choice(words(found[1], held_out)), form)


def words(name: str, held_out: bool) -> list[str]:
    everything = WORDS[name].split("|") if "|" in WORDS[name] else WORDS[name].split()
    return [word for place, word in enumerate(everything) if (place % 8 == 7) == held_out]


if __name__ == "__main__":
    main()
