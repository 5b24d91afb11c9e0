"""Writes the sixteen everyday tasks, twelve completions and four choices, as <task>/train.jsonl and eval.jsonl.

    python -m tasks.everyday.make               # all tasks, into this folder; the same bytes at every run
    python -m tasks.everyday.make date price    # these alone

A prompt is a frame around a text: "In: {text}\\n{cue}:" around "due on 9 March 2024", with the cue "ISO". The text is a
form, "due on {eu}", whose fields are drawn at random, and the answer follows from the fields. Training and two thirds
of evaluation use the known frames and forms; the other third has a new frame and a new form, and "held_out": true.
"""
import csv, datetime, io, json, pathlib, random, re, sys, unicodedata, zlib
from decimal import Decimal

import inflect, pycountry
from babel import Locale
from babel.dates import format_date
from babel.numbers import format_currency, format_decimal, get_currency_name
from faker import Faker
from num2words import num2words

ROWS = {"train": 1000, "eval": 200}
KNOWN_FRAMES = "{text}\n{cue}:", "In: {text}\n{cue}:", "{text} => {cue}:", "{cue} of {text}\n=", "In: {text}\nOut:"
NEW_FRAMES = "Given: {text}\nGive the {cue}:", "{text} | {cue} =", "Q: {cue}? {text}\nA:"
FEW = "log", "mask"                                     # completions with too few answers to keep some for evaluation

FAKES = [Faker(locale) for locale in ("en_US", "en_GB", "de_DE", "fr_FR", "es_ES", "it_IT")]
ENGLISH = inflect.engine()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
ITEMS = """lamp chair table kettle toaster camera phone laptop printer keyboard mouse desk sofa mirror clock radio
watch jacket scarf coat dress shirt bag suitcase tent bicycle helmet drill hammer saw ladder brush bucket vase carpet
pillow blanket mattress stove fridge freezer mixer heater fan charger battery cable speaker guitar""".split()
NOUNS = ITEMS + """actor address anchor angel apple baby bakery bean belief berry box boy bridge bus bush butterfly
calf candle canoe castle cat cave century cherry child church circus class cloth copy country couch crisis cross daisy
day diary doctor dog donkey door duty dwarf eagle echo egg elf enemy factory fairy family farmer feather fish flower
fly foot forest fox frog giant goose grape guess half hero hobby hoof horse hour island jelly judge king kiss knee
knife lady leaf lens library lie life lily loaf louse lunch man mess monkey month moth mountain mouth nanny navy needle
nest nurse ostrich ox painter pass peach pencil penny peony person photo piano pirate play poem poppy potato prize
puppy queen quiz reef rose ruby sash school scientist sea sheaf sheep shelf ship shoe sky spy star story summary switch
theory thesis thief thorn tomato tooth toy tree valley victory vision wharf wife witch wolf woman zero""".split()
CODES = [country.alpha_2 for country in pycountry.countries]
UNITS = [("km", "m", 1000), ("m", "cm", 100), ("cm", "mm", 10), ("kg", "g", 1000), ("t", "kg", 1000), ("l", "ml", 1000),
         ("h", "min", 60), ("min", "s", 60), ("days", "h", 24), ("weeks", "days", 7), ("ft", "in", 12)]
MONEY = [("en_US", "USD"), ("en_GB", "GBP"), ("en_IE", "EUR"), ("de_DE", "EUR"), ("fr_FR", "EUR"), ("de_CH", "CHF"),
         ("pl_PL", "PLN"), ("cs_CZ", "CZK"), ("pt_BR", "BRL"), ("tr_TR", "TRY"), ("en_IN", "INR")]
DATES = {"en": "d MMMM", "de": "d. MMMM", "fr": "d MMMM", "es": "d 'de' MMMM", "it": "d MMMM"}
PARTS = "api auth backup billing cache cron db dns gateway mail metrics proxy queue scheduler search storage".split()
MESSAGES = """timeout after {n} ms;request {n} failed;job {n} done;retry {k} of 60;{k} files read;user {n} left
disk {k}% full;key {n} not found;line {k} skipped;lost host {city};port {n} open""".replace("\n", ";").split(";")
compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


# -------------------------------------------------------------------------------------------- what the fields are
def plain(text):
    """Return the letters of a name as they stand in an e-mail address: a to z."""
    return re.sub("[^a-z]", "", unicodedata.normalize("NFKD", text.lower().replace("ß", "ss")))


def basics(rng):
    """Return the fields that most texts use: a person, a place, a thing, numbers, a date in five languages."""
    fake, place = rng.choice(FAKES), rng.choice(FAKES[:-1])                # Faker shuffles the Italian cities unseeded
    first, last, city = (next(text for text in iter(make, None) if len(text) <= 8)          # prompts are short
                         for make in (fake.first_name, fake.last_name, place.city))
    date = a_date(rng).replace(day=rng.randint(12, 28))                           # never 1er (French) or l'8 (Italian)
    host = rng.choice(["example.com", "example.org", "example.net"])
    email = rng.choice(["{0}", "{1}", "{2}{1}"]).format(plain(first), plain(last), plain(first)[0])
    return dict(first=first, last=last, name=f"{first} {last}", i=first[0], city=city, email=f"{email}@{host}",
                phone=f"{rng.randint(201, 989)}-555-01{rng.randrange(100):02}",          # 555-01xx is kept for fiction
                item=rng.choice(ITEMS), day=rng.choice(DAYS), n=rng.randrange(1000, 99999), k=rng.randint(2, 60),
                **{code: format_date(date, pattern, code) for code, pattern in DATES.items()})


def a_date(rng):
    return datetime.date(1950, 1, 1) + datetime.timedelta(rng.randrange(36500))


def a_sum(rng):
    return Decimal(rng.randrange(100, 10 ** rng.randint(4, 6))) / 100


# ------------------------------------------------- a completion: (rng, the text's form) -> its fields and the answer
def contact(rng, form):
    fields = basics(rng)
    return fields, compact({key: fields[key] for key in ("name", "email", "phone")})


def date(rng, form):
    day = a_date(rng)
    patterns = dict(eu="d MMMM y", us="MMMM d, y", full="EEEE, d MMMM y", short="d MMM y", dots="d.M.y", m="MMMM")
    fields = {key: format_date(day, pattern, "en") for key, pattern in patterns.items()}
    return fields | dict(y=day.year, d=day.day, nth=ENGLISH.ordinal(day.day)), day.isoformat()


def clock(rng, form):
    hour, minute = divmod(rng.randrange(24 * 60), 60)
    past = minute <= 30
    near = hour if past else hour + 1                                                    # the hour that is named
    count = minute if past else 60 - minute
    words = {15: "quarter", 30: "half"}.get(count)
    words = words or num2words(count) + ("" if count % 5 == 0 else " minute" if count == 1 else " minutes")
    part = "in the morning" if near < 12 else "in the afternoon" if near < 18 else "in the evening"
    named = {0: "midnight", 12: "noon", 24: "midnight"}.get(near) or f"{num2words(near % 12)} {part}"
    return dict(x=f"{words} {'past' if past else 'to'} {named}" if minute else named), f"{hour:02}:{minute:02}"


def one_of(items, shown, answer):
    """Return the function of a task whose text shows one of the items as x."""
    def make(rng, form):
        item = rng.choice(items)
        return dict(x=shown(item)), answer(item)
    return make


def price(rng, form):
    (locale, code), value = rng.choice(MONEY), a_sum(rng)
    amount, symbol = format_decimal(value, "#,##0.00", "en"), format_currency(value, code, locale=locale)
    fields = dict(amount=amount, name=get_currency_name(code, value, "en"), p=" ".join(symbol.split()))
    return fields, f"{value:.2f} {code}"


def unit(rng, form):
    large, small, factor = rng.choice(UNITS)
    easy = factor % 10 == 0 and factor != 60                           # a shift of the point; else small whole numbers
    value = Decimal(rng.randint(2, 999)) / rng.choice([1, 10]) if easy else Decimal(rng.randint(2, 20))
    return dict(v=f"{value.normalize():f}", a=large, b=small), f"{(value * factor).normalize():f} {small}"


def mask(rng, form):
    fields = basics(rng)
    return fields, form.format(**fields | dict(email="[EMAIL]", phone="[PHONE]"))


def citation(rng, form):
    fields = basics(rng)
    first, second = (ENGLISH.plural_noun(noun) for noun in rng.sample(NOUNS, 2))
    title = rng.choice(["{} and {}", "{} without {}", "{} of the {}"]).format(first.capitalize(), second)
    year = rng.randint(1950, 2025)
    return fields | dict(title=title, year=year), f"{plain(fields['last'])}{year}{first}"


def csv_field(rng, form):
    fields = basics(rng)
    values = dict(name=fields["name"], index=f"{fields['last']}, {fields['first']}", date=a_date(rng).isoformat(),
                  price=f"{a_sum(rng):.2f}", **{key: fields[key] for key in ("city", "item", "phone", "email")})
    columns = rng.sample(sorted(values), 3)
    line = io.StringIO()
    csv.writer(line).writerow([values[column] for column in columns])
    column = rng.choice(columns)
    return dict(header=",".join(columns), line=line.getvalue().strip(), column=column), values[column]


def log(rng, form):
    fields, level, part = basics(rng), rng.choice("debug info warning error fatal".split()), rng.choice(PARTS)
    fields |= dict(date=a_date(rng), time=f"{rng.randrange(24):02}:{rng.randrange(60):02}:{rng.randrange(60):02}")
    return fields | dict(level=level, LEVEL=level.upper(), part=part, message=rng.choice(MESSAGES).format(**fields)), (
        f"{level.upper()} {part}")


# ------------------------------- the tasks: cue, how a completion is made, "known form / ... // new form / ..."
COMPLETIONS = {
    "citation": ("Key", citation, "{last}, {first}: {title}. {year}. / {first} {last} ({year}): {title}. / "
                 "{title}, by {first} {last}, {year} / {last}, {i}. ({year}). {title}. / {last} {year}, {title} // "
                 "{title} ({i}. {last}, {year}) / {year}: {first} {last}, {title} / {last}, {title}, {year}, p. {k}"),
    "clock": ("24 h", clock, "{x} / at {x} / meet me at {x} / the bus goes at {x} / alarm: {x} // "
              "until {x} / wake up at {x} / we close at {x}"),
    "contact": ("JSON", contact, "{name}, {email}, {phone} / {name} <{email}>, tel. {phone} / "
                "{phone}: {name} ({email}) / Call {name}, {phone}, or write to {email}. / {email} {phone} {name} // "
                "{email} is from {name}, {phone} / I am {name}. Phone: {phone}. Mail: {email}"),
    "country": ("Code", one_of(CODES, Locale("en").territories.get, str),
                "{x} / country {x} / from {x} / ship to {x} / made in {x} / born in {x} // "
                "visit {x} / flag of {x} / a stamp from {x}"),
    "csv": ("Value", csv_field, "{header}\n{line}\n{column} / {column} in\n{header}\n{line} / "
            "select {column} from\n{header}\n{line} / {column}? {header}\n{line} / "
            "columns {header}\nline {line}\nwanted {column} // "
            "get {column}:\n{header}\n{line} / {header}\n{line}\nonly {column}"),
    "date": ("ISO", date, "{eu} / {us} / {full} / {short} / {dots} / due on {eu} / since {us} / on {full} // "
             "the {nth} of {m}, {y} / {m} the {nth}, {y} / {y}, {m} {d}"),
    "log": ("Level, part", log, "{date} {time} {LEVEL} [{part}] {message} / {time} {part}: {level}: {message} / "
            "[{LEVEL}] {part} - {message} / level={level} part={part} {message} / {part}[{n}]: {LEVEL} {message} // "
            "{LEVEL}|{part}|{message} / {time} ({part}) {level} {message} / {date} {part}/{level}: {message}"),
    "mask": ("Masked", mask, "Write to {email}, {first}. / Call {first}: {phone} / {first} ({email}) has the {item} / "
             "On {day} try {phone} in {city}. / {email} has the {item} / {item}: {phone}, {email}, {first} // "
             "My number in {city} is {phone}. / The {item} is for {email}. / {first}, {phone} or {email}"),
    "number": ("Digits", one_of([*range(2, 1000), *range(1000, 10000, 9)], num2words, str),
               "{x} / page {x} / {x} people / {x} steps / no. {x} // room {x} / {x} times / about {x}"),
    "plural": ("Plural", one_of(NOUNS, str, ENGLISH.plural_noun),
               "{x} / one {x} / a single {x} / the {x} / this {x} / every {x} // each {x} / my {x} / {x} (noun)"),
    "price": ("Amount", price, "{p} / total {p} / {p} a month / {amount} {name} / only {p} today / "
              "bill: {amount} {name} // pay {p} now / it costs {p} / worth {amount} {name}"),
    "unit": ("Result", unit, "{v} {a} in {b} / {v} {a} to {b} / how many {b} are {v} {a} / {b} in {v} {a} / "
             "{v} {a} are ? {b} // turn {v} {a} into {b} / {v} {a} expressed in {b}")}

CHOICES = {"intent": ("Intent", """
refund: The {item} arrived broken and I want my money back. / Please pay me back for order {n}. / You charged me twice
 for the {item}. / I sent back the {item} on {day}, when do I get the money? / The {item} is not what I ordered, please
 reimburse me. // The {item} does not work; credit the sum to my card. / How do I get back what I paid for no. {n}?
delivery: Where is order {n}? / My {item} should have come on {day}. / The parcel for {city} has not arrived. / When
 will the {item} get to {city}? / Can the courier bring the {item} on {day}? // I am still waiting at home for the
 {item}. / Has no. {n} left your warehouse?
login: I forgot my password, {first} here. / My account {n} is locked since {day}. / I cannot sign in from {city}. / The
 page does not accept my user name {n}. / {first} here, how do I reset my password? // The app logs me out again and
 again since {day}, user {n}. / I have no access to profile {n} any more.
invoice: I need the bill for order {n} as a PDF. / The VAT number on invoice {n} is wrong. / Please send the invoice
 for the {item} to {first}. / Our address in {city} is missing on the invoice. / Can you make out the invoice to
 {first}? // The receipt for the {item} shows a wrong company. / Accounting in {city} asks for a copy of bill {n}."""),
           "language": ("Language", """
English: {name} lives in {city} with two cats. / The train to {city} is late again. / We open the shop in {city} on
 {en}. / {name} would like a table for {k} people. / There are {k} letters for {name} on the desk. // My sister married
 {name} on {en}. / It has been raining in {city} for {k} days.
German: {name} wohnt mit zwei Katzen in {city}. / Der Zug nach {city} hat wieder Verspätung. / Wir öffnen den Laden in
 {city} am {de}. / {name} möchte einen Tisch für {k} Personen. / Auf dem Schreibtisch liegen {k} Briefe für {name}. //
 Meine Schwester hat {name} am {de} geheiratet. / In {city} regnet es seit {k} Tagen.
French: {name} habite à {city} avec deux chats. / Le train pour {city} est encore en retard. / Nous ouvrons le magasin
 à {city} le {fr}. / {name} voudrait une table pour {k} personnes. / Il y a {k} lettres pour {name} sur le bureau. //
 Ma sœur a épousé {name} le {fr}. / Il pleut à {city} depuis {k} jours.
Spanish: {name} vive en {city} con dos gatos. / El tren a {city} llega tarde otra vez. / Abrimos la tienda de {city} el
 {es}. / {name} quisiera una mesa para {k} personas. / Hay {k} cartas para {name} en el escritorio. // Mi hermana se
 casó con {name} el {es}. / Llueve en {city} desde hace {k} días.
Italian: {name} abita a {city} con due gatti. / Il treno per {city} è di nuovo in ritardo. / Apriamo il negozio di
 {city} il {it}. / {name} vorrebbe un tavolo per {k} persone. / Ci sono {k} lettere per {name} sulla scrivania. // Mia
 sorella ha sposato {name} il {it}. / Piove a {city} da {k} giorni."""),
           "quantity": ("Unit", """
kg: How heavy is the {item} of {first}? / The parcel for {city} weighs {k}. / {first} lost {k} on a diet. / The mass of
 the {item} is {k}. / The lift in {city} carries at most {k}. // On the scales the {item} shows {k}. / {first} bought
 {k} of potatoes.
m: The tower in {city} is {k} high. / The {item} lies {k} from the door. / {first} swims {k}. / The river at {city} is
 {k} wide. / The hole is {k} deep, says {first}. // {first} jumps over a ditch of {k}. / The rope to the {item} has a
 length of {k}.
s: {first} runs the lap in {k}. / The light in {city} stays red for {k}. / How quickly does the {item} of {first}
 start? / {first} stays under water for {k}. / Press the button of the {item} for {k}. // Wait {k} before you touch the
 {item}. / The alarm in {city} rings for {k}.
l: The tank in {city} holds {k}. / {first} drinks {k} of water. / The {item} lost {k} of oil. / {first} pours {k} into
 the bucket. / The pool in {city} loses {k} a day. // The volume of the barrel is {k}, says {first}. / {first} needs {k}
 of fuel to {city}.
°C: It is {k} in {city} today. / How hot is the {item} of {first}? / Heat the {item} to {k}. / The water in {city} warms
 up to {k}. / Frost in {city}: minus {k}. // The thermometer of {first} reads {k}. / {first} sets the oven to {k}."""),
           "tone": ("Tone", """
friendly: Thanks a lot for the {item}, {first}! / Great to see you in {city} on {day}! / Hey {first}, coffee on {day}? /
 You made my day with that {item}, {first}! / Happy birthday, {first}! // So glad you like {city}, {first}! / Hugs from
 {city}, see you on {day}!
angry: I have had enough of this useless {item}, {first}! / You broke the {item} again, {first}! / Stop calling me on
 {day}, {first}! / Your office in {city} is a disgrace! / How dare you cancel {day}, {first}! // I am sick of waiting
 for the {item}, {first}! / Never again will I buy anything in {city}!
formal: Dear {name}, please find the {item} enclosed. / We hereby confirm the meeting in {city} on {day}. / Kindly
 return the {item} by {day}. / The board requests your presence in {city}. / With reference to no. {n}, we await your
 reply. // {name} is cordially invited to attend on {day}. / Please be advised that the office in {city} closes on
 {day}.
worried: I hope nothing has happened to {first} in {city}. / What if the {item} breaks before {day}? / I am afraid we
 will lose the {item}, {first}. / {first} has not called since {day}, should we ask the police? / Is it safe to travel
 to {city} now? // Do you think {first} is all right? / I keep wondering whether this {item} from {city} is safe.""")}
CHOICES = {task: (cue, dict(" ".join(line.split()).split(": ", 1) for line in re.split(r"\n(?=\S)", text.strip())))
           for task, (cue, text) in CHOICES.items()}                                    # a label -> its forms
TASKS = sorted(COMPLETIONS | CHOICES)


# ------------------------------------------------------------------------------------------------------------- rows
def wordings(task, label=None):
    """Return ((known frames, known forms), (new frames, new forms)) of a task, of a choice for one of its labels."""
    forms = CHOICES[task][1][label] if label else COMPLETIONS[task][2]
    known, new = (part.split(" / ") for part in forms.split(" // "))
    return (KNOWN_FRAMES, known), (NEW_FRAMES, new)


def draw(task, rng, label, new):
    """Return a row's prompt, a completion's answer, and what tells whether the row may be in train or in eval."""
    frames, forms = wordings(task, label)[new]
    frame, form = rng.choice(frames), rng.choice(forms)
    fields, answer = (basics(rng), None) if label else COMPLETIONS[task][1](rng, form)
    text = form.format(**fields)
    prompt = frame.format(text=text, cue=(CHOICES | COMPLETIONS)[task][0])
    return prompt, answer, prompt if task == "country" else text if label or task in FEW else answer


def rows(task, split):
    """Return the rows of a task's split. Each label has its turn; every third row of evaluation is held out.
    Train and eval share no answer of a completion, no text of FEW and of choices, and no prompt of country."""
    labels, rng, made = list(CHOICES[task][1]) if task in CHOICES else [], random.Random(f"{task}/{split}"), {}
    for k, fake in enumerate(FAKES):
        fake.seed_instance(f"{task}/{split}/{k}")
    while (k := len(made)) < ROWS[split]:
        new = split == "eval" and k % 3 == 0
        prompt, answer, key = draw(task, rng, labels[k % len(labels)] if labels else None, new)
        if prompt not in made and (zlib.crc32(key.encode()) % 6 == 0) == (split == "eval"):
            answered = dict(choices=[f" {label}" for label in labels], gold_idx=k % len(labels)) if labels else (
                dict(completion=f" {answer}"))
            made[prompt] = dict(prompt=prompt, **answered, **{"held_out": True} if new else {})
    return list(made.values())


def write(path, made):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(compact(row) + "\n" for row in made), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    for task in sys.argv[1:] or TASKS:
        for split in ROWS:
            write(pathlib.Path(__file__).parent / task / f"{split}.jsonl", made := rows(task, split))
        print(task, compact(made[1]))
