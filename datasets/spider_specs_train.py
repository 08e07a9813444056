"""The databases of the Spider set's training part."""

from random import Random

from spider_spec import (
    Database,
    Filter,
    Link,
    Measure,
    Row,
    Tables,
    Thing,
    after_year,
    date,
    either,
    later,
    maybe,
    number,
    one_of,
    ref,
    rows,
)

LIBRARY = Database(
    "town_library",
    schema="""\
CREATE TABLE branch (
    branch_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    district TEXT NOT NULL,
    opened DATE NOT NULL,
    seats INTEGER NOT NULL,
    phone TEXT
);
CREATE TABLE author (
    author_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    country TEXT NOT NULL,
    birth_year INTEGER
);
CREATE TABLE book (
    book_id INTEGER PRIMARY KEY,
    title TEXT NOT NULL,
    author_id INTEGER NOT NULL REFERENCES author (author_id),
    genre TEXT NOT NULL,
    published INTEGER NOT NULL,
    pages INTEGER NOT NULL,
    branch_id INTEGER NOT NULL REFERENCES branch (branch_id),
    translator TEXT
);
CREATE TABLE member (
    member_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    town TEXT NOT NULL,
    joined DATE NOT NULL,
    email TEXT
);
CREATE TABLE loan (
    loan_id INTEGER PRIMARY KEY,
    book_id INTEGER NOT NULL REFERENCES book (book_id),
    member_id INTEGER NOT NULL REFERENCES member (member_id),
    loaned DATE NOT NULL,
    returned DATE,
    fine REAL NOT NULL
);
""",
    rows={
        "branch": rows("""
            Old Harbour | Docks | 1921-05-02 | 64 | 555-0101
            Mill Lane | Riverside | 1957-09-14 | 40 |
            Sankt Jürgen | Riverside | 1988-03-21 | 112 | 555-0144
            Cathedral Square | Centre | 1899-10-01 | 150 | 555-0110
            Greenfield | Northgate | 2006-06-17 | 85 | 555-0162
            Station Road | Centre | 1974-01-28 | 52 |
            Orchard Park | Northgate | 2019-11-09 | 96 | 555-0177
        """),
        "author": rows("""
            Maren Ødegaard | Norway | 1961
            Tomás Villaseñor | Mexico | 1948
            Ines Kowalczyk | Poland | 1979
            Edwin Achterberg | Netherlands | 1933
            Rosalind Pike | Ireland |
            Jean-Luc Béranger | France | 1955
            Hana Svobodová | Czechia | 1984
            Gideon Marsh | Ireland | 1970
            Aiko Tanemura | Japan | 1966
            Lucía Herrero | Mexico | 1990
            Bertil Åström | Sweden |
            Celeste Duval | France | 1972
        """),
        "book": rows(
            """
            The Salt Ledger | 1 | novel | 1994
            Winter on the Quay | 1 | novel | 2003
            Nine Small Bridges | 1 | short stories | 2010
            El jardín de ceniza | 2 | novel | 1979
            A Cartographer's Year | 2 | travel | 1988
            The Glass Orchard | 3 | novel | 2008
            Letters to Gdynia | 3 | biography | 2016
            Polder Light | 4 | poetry | 1967
            The Dyke Warden | 4 | history | 1975
            Rain over Clonmore | 5 | poetry | 1981
            Le dernier été | 6 | novel | 1992
            Bread and Iron | 6 | history | 2001
            The Clockmaker of Brno | 7 | crime | 2014
            Twelve Locked Rooms | 7 | crime | 2019
            A Murder at Low Tide | 8 | crime | 1999
            The Peat Cutter's Son | 8 | novel | 2006
            Paper Cranes | 9 | short stories | 2002
            Kyoto in a Teacup | 9 | travel | 2012
            Mapa de sombras | 10 | poetry | 2018
            The Long Ferry | 1 | travel | 1996
            Northern Kitchens | 11 | cookery | 1963
            Soup for Forty | 11 | cookery | 1971
            Une valise à Nantes | 12 | crime | 2009
            The Lamp Inspector | 12 | crime | 2004
            Chronicle of a Drought | 2 | history | 1984
            Six Weeks in Oaxaca | 10 | travel | 2021
            The Beekeeper's Atlas | 3 | history | 2013
            Voices from the Weir | 8 | biography | 2011
            Harvest Songs | 5 | poetry | 1990
            The Blue Stairwell | 7 | crime | 2020
        """,
            number(96, 612),
            ref("branch", but=(7,)),
            maybe(55, one_of("Olga Brandt", "Piet Vos", "Noor Haddad", "Émile Roux")),
        ),
        "member": rows(
            """
            Anneli Koskinen | Westbrook
            Sam Whitlock | Westbrook
            Fatima Zahra Idrissi | Harrow End
            Lukas Brandl | Harrow End
            Chloé Marchand | Tidewell
            Derek Olufemi | Tidewell
            Priya Raman | Westbrook
            Søren Holm | Tidewell
            Beatriz Antunes | Larkfield
            Joan Trewin | Larkfield
            Mateusz Zieliński | Westbrook
            Olive Barton | Harrow End
            Rafael Quintana | Larkfield
            Grete Lindqvist | Westbrook
            Yusuf Demir | Tidewell
        """,
            date("2012-01-01", "2022-01-31"),
            maybe(30, one_of("post@example.org", "mail@example.org")),
        ),
        "loan": rows(
            70,
            ref("book", but=(8, 17, 26)),
            ref("member", but=(10, 14)),
            date("2022-02-01", "2023-11-30"),
            maybe(15, later(3, 3, 60)),
            one_of(0, 0, 0, 0.5, 1, 1.5, 2, 3.5),
        ),
    },
    things=(
        Thing(
            "branch",
            "branch",
            "branches",
            "that",
            {"name": "name", "district": "district", "opened": "opening date", "seats": "number of seats"},
            (
                Filter("that lie in {}", "district = {}", ("Riverside", "Centre", "Northgate")),
                Filter("that opened before {}", "opened < {}", ("1950-01-01", "1980-01-01")),
                Filter("that have more than {} seats", "seats > {}", (60, 90)),
                Filter("that have no phone number", "phone IS NULL"),
            ),
            (
                Measure("seats", "{} with the most seats", "{} with the fewest seats", total=True),
                Measure("opened", "most recently opened {}", "oldest {}", date=True),
            ),
            ("district",),
            "the {} branch",
        ),
        Thing(
            "author",
            "author",
            "authors",
            "who",
            {"name": "name", "country": "country"},
            (
                Filter("who come from {}", "country = {}", ("Ireland", "France", "Mexico")),
                Filter("who were born between {} and {}", "birth_year BETWEEN {} AND {}", ((1950, 1975), (1930, 1960))),
                Filter("who were born after {}", "birth_year > {}", (1965, 1975)),
                Filter("whose year of birth is unknown", "birth_year IS NULL"),
            ),
            (),
            ("country",),
        ),
        Thing(
            "book",
            "book",
            "books",
            "that",
            {"title": "title", "genre": "genre", "pages": "number of pages", "published": "year of publication"},
            (
                Filter("that belong to the genre {}", "genre = {}", ("novel", "crime", "poetry", "history", "travel")),
                Filter("that have more than {} pages", "pages > {}", (250, 300, 400)),
                Filter("that have fewer than {} pages", "pages < {}", (200, 250, 350)),
                Filter(
                    "that were published between {} and {}", "published BETWEEN {} AND {}", ((1960, 1980), (1990, 2010))
                ),
                Filter("that were published after {}", "published > {}", (1985, 2000)),
                Filter("whose title begins with “The”", "title LIKE 'The %'"),
                Filter("that were translated by {}", "translator = {}", ("Olga Brandt", "Émile Roux", "Noor Haddad")),
                Filter("that have a translator", "translator IS NOT NULL"),
            ),
            (
                Measure("pages", "longest {}", "shortest {}", total=True),
                Measure("published", "most recent {}", "oldest {}", date=True),
            ),
            ("genre",),
            "“{}”",
        ),
        Thing(
            "member",
            "member",
            "members",
            "who",
            {"name": "name", "town": "town", "joined": "joining date"},
            (
                Filter("who live in {}", "town = {}", ("Westbrook", "Harrow End", "Tidewell", "Larkfield")),
                Filter("who joined after {}", "joined > {}", ("2017-06-30", "2019-12-31")),
                Filter("who joined before {}", "joined < {}", ("2016-01-01", "2018-01-01")),
                Filter("who have given no email address", "email IS NULL"),
            ),
            (Measure("joined", "newest {}", "longest-standing {}", date=True),),
            ("town",),
        ),
        Thing(
            "loan",
            "loan",
            "loans",
            "that",
            {"loan_id": "loan number", "loaned": "loan date", "fine": "fine"},
            (
                Filter("that began after {}", "loaned > {}", ("2022-12-31", "2023-06-30")),
                Filter("that began before {}", "loaned < {}", ("2022-07-01", "2023-01-01")),
                Filter("that have not been returned", "returned IS NULL"),
                Filter("that led to a fine of more than {} euros", "fine > {}", (0.5, 2)),
                Filter("that cost no fine", "fine = 0"),
            ),
            (Measure("fine", "{} with the highest fine", "{} with the lowest fine", total=True),),
        ),
    ),
    links=(
        Link("book", "author_id", "author", "have written", "has written", "that were written by"),
        Link("book", "branch_id", "branch", "hold", "holds", "that are held by"),
        Link("loan", "member_id", "member", "have made", "has made", "that were made by"),
        Link("loan", "book_id", "book", "have had", "has had", "that concern"),
    ),
    hard="""
Which books have never been lent? Give their titles.
    SELECT title FROM book WHERE book_id NOT IN (SELECT book_id FROM loan)

What are the names of the members who have borrowed a book by Maren Ødegaard? List each only once.
    SELECT DISTINCT T1.name FROM member AS T1 JOIN loan AS T2 ON T1.member_id = T2.member_id
    JOIN book AS T3 ON T2.book_id = T3.book_id JOIN author AS T4 ON T3.author_id = T4.author_id
    WHERE T4.name = 'Maren Ødegaard'

How many members live in the same town as Chloé Marchand, not counting her?
    SELECT COUNT(*) FROM member
    WHERE town = (SELECT town FROM member WHERE name = 'Chloé Marchand') AND name <> 'Chloé Marchand'

List the titles of the books that have more pages than the average book of their own genre.
    SELECT T1.title FROM book AS T1 WHERE T1.pages > (SELECT AVG(T2.pages) FROM book AS T2 WHERE T2.genre = T1.genre)

Which authors have books in more than two branches? Give the name of each and the number of branches.
    SELECT T2.name, COUNT(DISTINCT T1.branch_id) FROM book AS T1 JOIN author AS T2 ON T1.author_id = T2.author_id
    GROUP BY T2.author_id HAVING COUNT(DISTINCT T1.branch_id) > 2

How many books have a translator, and how many books are there in all?
    SELECT COUNT(translator), COUNT(*) FROM book

For each translator, count the books translated. Leave out the books that have none.
    SELECT translator, COUNT(*) FROM book WHERE translator IS NOT NULL GROUP BY translator

In which year and month did the most loans begin? Show the month as YYYY-MM.
    SELECT strftime('%Y-%m', loaned) FROM loan GROUP BY strftime('%Y-%m', loaned) ORDER BY COUNT(*) DESC LIMIT 1

How many loans began in each year? Show the year and the number, the earlier year first.
    SELECT strftime('%Y', loaned), COUNT(*) FROM loan GROUP BY strftime('%Y', loaned) ORDER BY strftime('%Y', loaned)

What is the total of the fines paid by each member who has paid more than 6 euros altogether? Show the name and the sum.
    SELECT T2.name, SUM(T1.fine) FROM loan AS T1 JOIN member AS T2 ON T1.member_id = T2.member_id
    GROUP BY T2.member_id HAVING SUM(T1.fine) > 6

Which members have borrowed both crime and poetry? Give their names.
    SELECT T1.name FROM member AS T1 JOIN loan AS T2 ON T1.member_id = T2.member_id
    JOIN book AS T3 ON T2.book_id = T3.book_id WHERE T3.genre = 'crime'
    INTERSECT SELECT T1.name FROM member AS T1 JOIN loan AS T2 ON T1.member_id = T2.member_id
    JOIN book AS T3 ON T2.book_id = T3.book_id WHERE T3.genre = 'poetry'

Name the authors of whom the library has no book published after 2000.
    SELECT T1.name FROM author AS T1
    WHERE NOT EXISTS (SELECT * FROM book AS T2 WHERE T2.author_id = T1.author_id AND T2.published > 2000)

What are the title and the number of pages of the longest book that is held by the Sankt Jürgen branch?
    SELECT T1.title, T1.pages FROM book AS T1 JOIN branch AS T2 ON T1.branch_id = T2.branch_id
    WHERE T2.name = 'Sankt Jürgen' ORDER BY T1.pages DESC LIMIT 1

Which loan was the first to be returned? Give its number and the day of its return.
    SELECT loan_id, returned FROM loan WHERE returned IS NOT NULL ORDER BY returned LIMIT 1

Which towns have members but no member without an email address?
    SELECT town FROM member EXCEPT SELECT town FROM member WHERE email IS NULL

List all names of authors and of members that contain the letter é.
    SELECT name FROM author WHERE name LIKE '%é%' UNION SELECT name FROM member WHERE name LIKE '%é%'
""",
)

BAKERY = Database(
    "corner_bakery",
    schema="""\
CREATE TABLE baker (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    speciality TEXT NOT NULL,
    hired DATE NOT NULL,
    hourly_wage REAL NOT NULL,
    mentor_id INTEGER REFERENCES baker (id)
);
CREATE TABLE product (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    category TEXT NOT NULL,
    price REAL NOT NULL,
    weight INTEGER NOT NULL,
    baker_id INTEGER NOT NULL REFERENCES baker (id),
    nuts TEXT NOT NULL,
    launched DATE
);
CREATE TABLE customer (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    street TEXT NOT NULL,
    birthday DATE
);
CREATE TABLE purchase (
    id INTEGER PRIMARY KEY,
    customer_id INTEGER NOT NULL REFERENCES customer (id),
    product_id INTEGER NOT NULL REFERENCES product (id),
    day DATE NOT NULL,
    pieces INTEGER NOT NULL,
    discount INTEGER
);
""",
    rows={
        "baker": rows("""
            Zoë Laurent | pastry | 2011-04-18 | 24.5 |
            Henk Dijkstra | bread | 2008-09-01 | 26 |
            Marta Oliveira | cakes | 2015-02-09 | 21.5 | 1
            Ignác Dvořák | bread | 2016-07-25 | 20 | 2
            Sorcha Flynn | pastry | 2018-03-12 | 18.5 | 1
            Ali Rezaei | biscuits | 2019-10-21 | 17.5 | 3
            Wanda Brzęczek | cakes | 2021-01-11 | 16 | 3
            Theo Grimaldi | bread | 2022-05-30 | 15.5 | 4
            Nell Abbott | biscuits | 2023-02-06 | 14 | 6
        """),
        "product": rows("""
            Country Loaf | bread | 4.2 | 800 | 2 | no | 2008-10-01
            Rye Brick | bread | 4.8 | 750 | 2 | no | 2009-03-15
            Walnut Bâtard | bread | 5.4 | 600 | 4 | yes | 2017-01-20
            Sesame Ring | bread | 2.1 | 180 | 4 | no | 2018-06-04
            Baguette | bread | 1.9 | 250 | 2 | no |
            Olive Fougasse | bread | 3.9 | 320 | 4 | no | 2020-09-11
            Croissant | pastry | 1.8 | 70 | 1 | no |
            Pain au chocolat | pastry | 2.2 | 85 | 1 | no | 2011-05-02
            Almond Crescent | pastry | 2.9 | 95 | 5 | yes | 2018-11-23
            Kouign-amann | pastry | 3.4 | 110 | 1 | no | 2013-08-17
            Cinnamon Knot | pastry | 2.6 | 100 | 5 | no | 2019-02-28
            Apple Turnover | pastry | 2.5 | 120 | 5 | no | 2021-10-05
            Sachertorte | cake | 32 | 1200 | 3 | no | 2015-12-01
            Carrot Cake | cake | 26 | 1100 | 3 | yes | 2016-04-14
            Lemon Drizzle | cake | 18.5 | 700 | 7 | no | 2021-03-19
            Prinsesstårta | cake | 36 | 1300 | 3 | yes | 2019-05-25
            Plum Kuchen | cake | 21 | 900 | 7 | no | 2022-08-30
            Cheesecake | cake | 28 | 1150 | 7 | no | 2021-06-12
            Oat Biscuit | biscuit | 0.9 | 30 | 6 | no | 2020-01-08
            Hazelnut Snap | biscuit | 1.2 | 25 | 6 | yes | 2020-02-17
            Ginger Star | biscuit | 1.1 | 28 | 6 | no |
            Linzer Eye | biscuit | 1.6 | 40 | 6 | yes | 2021-11-29
            Anise Drop | biscuit | 0.7 | 20 | 6 | no | 2022-12-03
            Pretzel | bread | 1.5 | 95 | 2 | no | 2012-10-08
        """),
        "customer": rows("""
            Ottilie Kern | Canal Street | 1958-06-11
            James Adeyemi | Market Row | 1990-02-27
            Paloma Ruiz | Canal Street | 1985-12-03
            Viktor Lindgren | Tanner Lane |
            Mei-Ling Tsai | Market Row | 2001-08-19
            François Mercier | Abbey Hill | 1972-04-30
            Dora Szabó | Tanner Lane | 1966-10-08
            Gareth Pugh | Abbey Hill |
            Amara Nwosu | Canal Street | 1994-01-15
            Ruth Feldmann | Market Row | 1949-09-22
            Tadeusz Wilk | Canal Street |
            Ísold Jónsdóttir | Abbey Hill | 1998-11-05
        """),
        "purchase": rows(
            75,
            ref("customer", but=(8,)),
            ref("product", but=(6, 17)),
            date("2023-01-02", "2023-12-23"),
            one_of(1, 1, 2, 2, 3, 4, 6, 10, 12),
            maybe(70, one_of(5, 10, 20)),
        ),
    },
    things=(
        Thing(
            "baker",
            "baker",
            "bakers",
            "who",
            {"name": "name", "speciality": "speciality", "hired": "hiring date", "hourly_wage": "hourly wage"},
            (
                Filter("whose speciality is {}", "speciality = {}", ("bread", "pastry", "cakes")),
                Filter("who were hired before {}", "hired < {}", ("2015-12-31", "2019-01-01")),
                Filter("who were hired after {}", "hired > {}", ("2016-01-01", "2020-12-31")),
                Filter("who earn more than {} euros an hour", "hourly_wage > {}", (17, 20)),
                Filter("who have no mentor", "mentor_id IS NULL"),
            ),
            (
                Measure("hourly_wage", "best-paid {}", "worst-paid {}"),
                Measure("hired", "most recently hired {}", "longest-serving {}", date=True),
            ),
            ("speciality",),
        ),
        Thing(
            "product",
            "product",
            "products",
            "that",
            {"name": "name", "category": "category", "price": "price", "weight": "weight"},
            (
                Filter("that belong to the category {}", "category = {}", ("bread", "pastry", "cake", "biscuit")),
                Filter("that cost less than {} euros", "price < {}", (2, 3, 5)),
                Filter("that cost more than {} euros", "price > {}", (2.5, 4, 20)),
                Filter("that cost between {} and {} euros", "price BETWEEN {} AND {}", ((1, 2), (2, 4))),
                Filter("that weigh more than {} grams", "weight > {}", (100, 300)),
                Filter("that weigh at most {} grams", "weight <= {}", (95, 250)),
                Filter("that contain nuts", "nuts = 'yes'"),
                Filter("that contain no nuts", "nuts = 'no'"),
                Filter("whose name contains “cake”", "name LIKE '%cake%'"),
                Filter("that were launched after {}", "launched > {}", ("2015-12-31", "2020-06-30")),
                Filter("whose launch date is unknown", "launched IS NULL"),
            ),
            (
                Measure("price", "most expensive {}", "cheapest {}"),
                Measure("weight", "heaviest {}", "lightest {}"),
            ),
            ("category",),
        ),
        Thing(
            "customer",
            "customer",
            "customers",
            "who",
            {"name": "name", "street": "street"},
            (
                Filter("who live in {}", "street = {}", ("Canal Street", "Market Row", "Abbey Hill")),
                Filter("who were born before {}", "birthday < {}", ("1970-01-01", "1990-01-01")),
                Filter("who were born after {}", "birthday > {}", ("1980-12-31",)),
                Filter("whose birthday is not recorded", "birthday IS NULL"),
            ),
            (),
            ("street",),
        ),
        Thing(
            "purchase",
            "purchase",
            "purchases",
            "that",
            {"id": "id", "day": "day", "pieces": "number of pieces"},
            (
                Filter("that were made in the first half of 2023", "day BETWEEN '2023-01-01' AND '2023-06-30'"),
                Filter(
                    "that were made between {} and {}",
                    "day BETWEEN {} AND {}",
                    (("2023-03-01", "2023-05-31"), ("2023-07-01", "2023-09-30")),
                ),
                Filter("that were made after {}", "day > {}", ("2023-09-30", "2023-05-31")),
                Filter("that comprise more than {} pieces", "pieces > {}", (3, 6)),
                Filter("that comprise a single piece", "pieces = 1"),
                Filter("that were given no discount", "discount IS NULL"),
                Filter("that were given a discount of {} percent", "discount = {}", (5, 10, 20)),
            ),
            (Measure("pieces", "{} with the most pieces", "{} with the fewest pieces", total=True),),
        ),
    ),
    links=(
        Link("product", "baker_id", "baker", "make", "makes", "that are made by"),
        Link("purchase", "customer_id", "customer", "have made", "has made", "that were made by"),
        Link("purchase", "product_id", "product", "have had", "has had", "that are for"),
    ),
    hard="""
For each baker who has a mentor, show the baker's name and the mentor's name.
    SELECT T1.name, T2.name FROM baker AS T1 JOIN baker AS T2 ON T1.mentor_id = T2.id

Which bakers are mentors? Give each name only once.
    SELECT DISTINCT T2.name FROM baker AS T1 JOIN baker AS T2 ON T1.mentor_id = T2.id

Name the bakers who mentor nobody.
    SELECT name FROM baker WHERE id NOT IN (SELECT mentor_id FROM baker WHERE mentor_id IS NOT NULL)

Which bakers earn at least 4 euros an hour less than their mentor?
    SELECT T1.name FROM baker AS T1 JOIN baker AS T2 ON T1.mentor_id = T2.id
    WHERE T2.hourly_wage - T1.hourly_wage >= 4

Which 5 products cost the most by weight, that is per gram? List their names, the dearest first.
    SELECT name FROM product ORDER BY price / weight DESC LIMIT 5

In which categories was a product launched before 2012 and another one after 2020?
    SELECT category FROM product WHERE launched < '2012-01-01'
    INTERSECT SELECT category FROM product WHERE launched > '2020-12-31'

What turnover did each category bring before discounts? Show the category and the price times the pieces, summed.
    SELECT T1.category, SUM(T1.price * T2.pieces) FROM product AS T1 JOIN purchase AS T2 ON T1.id = T2.product_id
    GROUP BY T1.category

Who has bought a product made by Zoë Laurent? List every customer once.
    SELECT DISTINCT T1.name FROM customer AS T1 JOIN purchase AS T2 ON T1.id = T2.customer_id
    JOIN product AS T3 ON T2.product_id = T3.id JOIN baker AS T4 ON T3.baker_id = T4.id WHERE T4.name = 'Zoë Laurent'

Find the customers who have bought a cake but never any biscuits.
    SELECT T1.name FROM customer AS T1 JOIN purchase AS T2 ON T1.id = T2.customer_id
    JOIN product AS T3 ON T2.product_id = T3.id WHERE T3.category = 'cake'
    EXCEPT SELECT T1.name FROM customer AS T1 JOIN purchase AS T2 ON T1.id = T2.customer_id
    JOIN product AS T3 ON T2.product_id = T3.id WHERE T3.category = 'biscuit'

Which products cost more than the average of their category? Show the name and the category.
    SELECT T1.name, T1.category FROM product AS T1
    WHERE T1.price > (SELECT AVG(T2.price) FROM product AS T2 WHERE T2.category = T1.category)

How many purchases were made in each month of 2023? Show the number of the month, such as 07, and the count.
    SELECT strftime('%m', day), COUNT(*) FROM purchase GROUP BY strftime('%m', day)

What is the average discount of the discounted purchases, and how many of those are there?
    SELECT AVG(discount), COUNT(discount) FROM purchase

How many products have an â or an å in their name?
    SELECT COUNT(*) FROM product WHERE name LIKE '%â%' OR name LIKE '%å%'

List the names of the products nobody has ever bought.
    SELECT T1.name FROM product AS T1 WHERE NOT EXISTS (SELECT * FROM purchase AS T2 WHERE T2.product_id = T1.id)

Which customer has bought the most pieces in all? Give the name and the number of pieces.
    SELECT T2.name, SUM(T1.pieces) FROM purchase AS T1 JOIN customer AS T2 ON T1.customer_id = T2.id
    GROUP BY T2.id ORDER BY SUM(T1.pieces) DESC LIMIT 1

Name the customers born before 1975, the oldest first.
    SELECT name FROM customer WHERE birthday < '1975-01-01' ORDER BY birthday
""",
)

RAILWAY = Database(
    "valley_railway",
    schema="""\
CREATE TABLE line (
    line_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    colour TEXT NOT NULL,
    length_km REAL NOT NULL,
    opened INTEGER NOT NULL,
    electrified TEXT NOT NULL
);
CREATE TABLE station (
    station_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    canton TEXT NOT NULL,
    altitude INTEGER NOT NULL,
    platforms INTEGER NOT NULL,
    closed INTEGER
);
CREATE TABLE stop (
    stop_id INTEGER PRIMARY KEY,
    line_id INTEGER NOT NULL REFERENCES line (line_id),
    station_id INTEGER NOT NULL REFERENCES station (station_id),
    position INTEGER NOT NULL
);
CREATE TABLE train (
    train_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    line_id INTEGER NOT NULL REFERENCES line (line_id),
    seats INTEGER NOT NULL,
    top_speed INTEGER NOT NULL,
    built DATE NOT NULL,
    overhauled DATE
);
CREATE TABLE delay (
    delay_id INTEGER PRIMARY KEY,
    train_id INTEGER NOT NULL REFERENCES train (train_id),
    day DATE NOT NULL,
    minutes INTEGER NOT NULL,
    cause TEXT
);
""",
    rows={
        "line": rows("""
            Lake Line | blue | 41.5 | 1872 | yes
            Gorge Line | green | 27.8 | 1903 | yes
            Summit Line | red | 12.4 | 1912 | yes
            Forest Line | brown | 33 | 1889 | no
            Orchard Line | green | 19.6 | 1931 | no
            Border Line | grey | 58.2 | 1868 | yes
        """),
        "station": rows("""
            Aldermatt | Upper Vale | 1340 | 2 |
            Brüggli | Upper Vale | 1105 | 1 |
            Cascata | Southmark | 610 | 2 |
            Dorfsee | Lakeside | 435 | 6 |
            Engstal | Upper Vale | 980 | 3 |
            Fontanère | Southmark | 540 | 2 | 1998
            Grünau | Lakeside | 440 | 4 |
            Hochjoch | Upper Vale | 1875 | 1 |
            Inselbad | Lakeside | 428 | 2 |
            Jurahof | Westwald | 720 | 1 | 1976
            Kirchberg | Westwald | 655 | 3 |
            Lindenort | Westwald | 590 | 2 |
            Mühlbach | Westwald | 685 | 1 | 2009
            Neumarkt | Lakeside | 450 | 8 |
            Obstfeld | Lakeside | 470 | 2 |
            Pontresca | Southmark | 580 | 4 |
            Quellen | Upper Vale | 1220 | 1 | 1984
            Rocca Alta | Southmark | 890 | 2 |
        """),
        "stop": rows("""
            1 | 4 | 1
            1 | 9 | 2
            1 | 7 | 3
            1 | 14 | 4
            2 | 14 | 1
            2 | 5 | 2
            2 | 2 | 3
            2 | 1 | 4
            3 | 1 | 1
            3 | 8 | 2
            4 | 14 | 1
            4 | 12 | 2
            4 | 11 | 3
            4 | 13 | 4
            5 | 7 | 1
            5 | 15 | 2
            5 | 12 | 3
            6 | 4 | 1
            6 | 14 | 2
            6 | 5 | 3
            6 | 18 | 4
            6 | 3 | 5
            6 | 16 | 6
        """),
        "train": rows(
            """
            Kingfisher | 1 | 220 | 120 | 2004-05-11
            Heron | 1 | 240 | 140 | 2012-09-30
            Grebe | 1 | 180 | 110 | 1996-03-18
            Chamois | 2 | 140 | 90 | 1999-11-02
            Marmot | 2 | 150 | 95 | 2008-06-25
            Ibex | 3 | 60 | 40 | 1987-04-14
            Edelweiß | 3 | 72 | 45 | 2015-07-01
            Badger | 4 | 110 | 80 | 1983-10-09
            Stoat | 4 | 96 | 85 | 1991-02-20
            Apricot | 5 | 84 | 75 | 1994-08-08
            Damson | 5 | 88 | 75 | 2001-12-12
            Saint Gallus | 6 | 310 | 160 | 2018-03-03
            Señora Blanca | 6 | 305 | 160 | 2019-01-17
            Röstigraben | 6 | 290 | 150 | 2010-10-10
            Old Postman | 4 | 64 | 60 | 1958-05-05
        """,
            maybe(40, date("2019-06-01", "2022-12-31")),
        ),
        "delay": rows(
            64,
            ref("train", but=(7, 11)),
            date("2023-01-01", "2023-12-31"),
            number(3, 75),
            maybe(20, one_of("snow", "snow", "signal fault", "signal fault", "animals on the track", "late crew")),
        ),
    },
    things=(
        Thing(
            "line",
            "line",
            "lines",
            "that",
            {
                "name": "name",
                "colour": "colour",
                "length_km": "length",
                "opened": "year of opening",
            },
            (
                Filter("that are longer than {} km", "length_km > {}", (20, 30)),
                Filter("that are shorter than {} km", "length_km < {}", (30, 40)),
                Filter("that were opened before {}", "opened < {}", (1890, 1910)),
                Filter("that were opened after {}", "opened > {}", (1880, 1900)),
                Filter("that are electrified", "electrified = 'yes'"),
                Filter("that are not electrified", "electrified = 'no'"),
            ),
            (
                Measure("length_km", "longest {}", "shortest {}", total=True),
                Measure("opened", "newest {}", "oldest {}", date=True),
            ),
            ("colour",),
            "the {}",
        ),
        Thing(
            "station",
            "station",
            "stations",
            "that",
            {"name": "name", "canton": "canton", "altitude": "altitude", "platforms": "number of platforms"},
            (
                Filter("that lie in the canton {}", "canton = {}", ("Upper Vale", "Lakeside", "Southmark", "Westwald")),
                Filter("that lie above {} metres", "altitude > {}", (600, 900)),
                Filter("that lie between {} and {} metres", "altitude BETWEEN {} AND {}", ((400, 600), (500, 1000))),
                Filter("that have more than {} platforms", "platforms > {}", (2, 3)),
                Filter("that have a single platform", "platforms = 1"),
                Filter("that have been closed", "closed IS NOT NULL"),
                Filter("that are still open", "closed IS NULL"),
                Filter("whose name contains “ü”", "name LIKE '%ü%'"),
            ),
            (
                Measure("altitude", "highest {}", "lowest {}"),
                Measure("platforms", "{} with the most platforms", "{} with the fewest platforms", total=True),
            ),
            ("canton",),
        ),
        Thing(
            "train",
            "train",
            "trains",
            "that",
            {
                "name": "name",
                "seats": "number of seats",
                "top_speed": "top speed",
                "built": "date of building",
            },
            (
                Filter("that have more than {} seats", "seats > {}", (100, 200)),
                Filter("that have fewer than {} seats", "seats < {}", (100, 150)),
                Filter("that can go faster than {} km/h", "top_speed > {}", (80, 110)),
                Filter("that were built before {}", "built < {}", ("2000-01-01", "2010-01-01")),
                Filter("that were built after {}", "built > {}", ("2003-12-31", "1995-06-30")),
                Filter("that have never been overhauled", "overhauled IS NULL"),
                Filter("that have been overhauled", "overhauled IS NOT NULL"),
            ),
            (
                Measure("seats", "{} with the most seats", "{} with the fewest seats", total=True),
                Measure("top_speed", "fastest {}", "slowest {}"),
                Measure("built", "newest {}", "oldest {}", date=True),
            ),
            named="the train {}",
        ),
        Thing(
            "delay",
            "delay",
            "delays",
            "that",
            {"delay_id": "delay id", "day": "day", "minutes": "duration", "cause": "cause"},
            (
                Filter("that were caused by {}", "cause = {}", ("snow", "signal fault", "late crew")),
                Filter("that have no known cause", "cause IS NULL"),
                Filter("that lasted more than {} minutes", "minutes > {}", (20, 45)),
                Filter("that lasted less than {} minutes", "minutes < {}", (10, 30)),
                Filter("that happened after {}", "day > {}", ("2023-06-30", "2023-09-30")),
                Filter("that happened in the first quarter of 2023", "day BETWEEN '2023-01-01' AND '2023-03-31'"),
                Filter(
                    "that happened between {} and {}",
                    "day BETWEEN {} AND {}",
                    (("2023-02-01", "2023-05-15"), ("2023-06-01", "2023-08-31")),
                ),
            ),
            (Measure("minutes", "longest {}", "shortest {}", total=True),),
        ),
    ),
    links=(
        Link("train", "line_id", "line", "have", "has", "that run on"),
        Link("delay", "train_id", "train", "have had", "has had", "that affected"),
    ),
    hard="""
At which stations does the Border Line stop? List their names in the order of the stops.
    SELECT T3.name FROM line AS T1 JOIN stop AS T2 ON T1.line_id = T2.line_id
    JOIN station AS T3 ON T2.station_id = T3.station_id WHERE T1.name = 'Border Line' ORDER BY T2.position

Which stations are served by more than one line? Show the name and the number of lines.
    SELECT T2.name, COUNT(*) FROM stop AS T1 JOIN station AS T2 ON T1.station_id = T2.station_id
    GROUP BY T2.station_id HAVING COUNT(*) > 1

What are the names of the stations that no line serves?
    SELECT name FROM station WHERE station_id NOT IN (SELECT station_id FROM stop)

Which closed stations still have a stop on some line?
    SELECT T1.name FROM station AS T1
    WHERE T1.closed IS NOT NULL AND EXISTS (SELECT * FROM stop AS T2 WHERE T2.station_id = T1.station_id)

At which stations do both the Forest Line and the Orchard Line stop?
    SELECT T3.name FROM line AS T1 JOIN stop AS T2 ON T1.line_id = T2.line_id
    JOIN station AS T3 ON T2.station_id = T3.station_id WHERE T1.name = 'Forest Line'
    INTERSECT SELECT T3.name FROM line AS T1 JOIN stop AS T2 ON T1.line_id = T2.line_id
    JOIN station AS T3 ON T2.station_id = T3.station_id WHERE T1.name = 'Orchard Line'

Which cantons does the Lake Line never touch?
    SELECT canton FROM station EXCEPT SELECT T1.canton FROM station AS T1
    JOIN stop AS T2 ON T1.station_id = T2.station_id JOIN line AS T3 ON T2.line_id = T3.line_id
    WHERE T3.name = 'Lake Line'

Give the name of each line and the name of the highest station it serves.
    SELECT T1.name, T3.name FROM line AS T1 JOIN stop AS T2 ON T1.line_id = T2.line_id
    JOIN station AS T3 ON T2.station_id = T3.station_id
    WHERE T3.altitude = (SELECT MAX(T5.altitude) FROM stop AS T4 JOIN station AS T5 ON T4.station_id = T5.station_id
    WHERE T4.line_id = T1.line_id)

What is the total delay in minutes on each line? Show the line's name and the sum, the worst line first.
    SELECT T3.name, SUM(T1.minutes) FROM delay AS T1 JOIN train AS T2 ON T1.train_id = T2.train_id
    JOIN line AS T3 ON T2.line_id = T3.line_id GROUP BY T3.line_id ORDER BY SUM(T1.minutes) DESC

Which causes led to more than 10 delays? Show the cause and the number, ignoring delays of unknown cause.
    SELECT cause, COUNT(*) FROM delay WHERE cause IS NOT NULL GROUP BY cause HAVING COUNT(*) > 10

How many delays are there for each cause, unknown causes included as a group of their own?
    SELECT cause, COUNT(*) FROM delay GROUP BY cause

List the names of the trains on lines that are not electrified and the names of those lines.
    SELECT T1.name, T2.name FROM train AS T1 JOIN line AS T2 ON T1.line_id = T2.line_id WHERE T2.electrified = 'no'

Which train has spent the most minutes in delays caused by signal faults?
    SELECT T2.name FROM delay AS T1 JOIN train AS T2 ON T1.train_id = T2.train_id WHERE T1.cause = 'signal fault'
    GROUP BY T2.train_id ORDER BY SUM(T1.minutes) DESC LIMIT 1

How many trains have fewer seats than the Stoat or a higher top speed than the Röstigraben?
    SELECT COUNT(*) FROM train WHERE seats < (SELECT seats FROM train WHERE name = 'Stoat')
    OR top_speed > (SELECT top_speed FROM train WHERE name = 'Röstigraben')

What are the names of the stations with the letter ü in them, in descending order of altitude?
    SELECT name FROM station WHERE name LIKE '%ü%' ORDER BY altitude DESC

For each canton, how many of its stations have been closed? Show every canton and that number.
    SELECT canton, COUNT(closed) FROM station GROUP BY canton

On which days was there more than one delay?
    SELECT day FROM delay GROUP BY day HAVING COUNT(*) > 1

Which lines have no train built after the year 2000?
    SELECT T1.name FROM line AS T1
    WHERE NOT EXISTS (SELECT * FROM train AS T2 WHERE T2.line_id = T1.line_id AND T2.built > '2000-12-31')
""",
)

MUSEUM = Database(
    "river_museum",
    schema="""\
CREATE TABLE artist (
    artist_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    nationality TEXT NOT NULL,
    born INTEGER NOT NULL,
    died INTEGER
);
CREATE TABLE room (
    room_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    floor INTEGER NOT NULL,
    area INTEGER NOT NULL,
    sponsor TEXT
);
CREATE TABLE exhibit (
    exhibit_id INTEGER PRIMARY KEY,
    title TEXT NOT NULL,
    kind TEXT NOT NULL,
    artist_id INTEGER NOT NULL REFERENCES artist (artist_id),
    year_made INTEGER NOT NULL,
    room_id INTEGER REFERENCES room (room_id),
    value INTEGER NOT NULL,
    acquired DATE NOT NULL,
    donor TEXT
);
CREATE TABLE guide (
    guide_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    mother_tongue TEXT NOT NULL,
    since DATE NOT NULL
);
CREATE TABLE tour (
    tour_id INTEGER PRIMARY KEY,
    guide_id INTEGER NOT NULL REFERENCES guide (guide_id),
    room_id INTEGER NOT NULL REFERENCES room (room_id),
    day DATE NOT NULL,
    visitors INTEGER NOT NULL,
    rating REAL
);
""",
    rows={
        "artist": rows("""
            Aurélie Fontanet | French | 1868 | 1941
            Ludvík Hrabal | Czech | 1902 | 1977
            Piero Santacroce | Italian | 1841 | 1909
            Ingrid Solheim | Norwegian | 1935 |
            Tobias Ackermann | German | 1811 | 1870
            Wei Lanying | Chinese | 1954 |
            Concepción Rueda | Spanish | 1889 | 1963
            Émilien Cordier | French | 1799 | 1856
            Nora Castellan | Italian | 1947 | 2016
            Jozef Wyrwa | Polish | 1921 | 1999
            Saskia van Loon | Dutch | 1970 |
            Giulia Marchetti | Italian | 1983 |
        """),
        "room": rows("""
            Long Gallery | 1 | 310 | Harbour Bank
            Blue Salon | 1 | 95 |
            Rotunda | 0 | 240 | Van Houten Foundation
            Print Cabinet | 2 | 60 |
            Sculpture Court | 0 | 420 | Harbour Bank
            Attic Studio | 3 | 75 |
            Glass Room | 2 | 130 | Fjeldstad AB
            Cloister | 0 | 180 |
        """),
        "exhibit": rows(
            """
            Morning at the Weir | painting | 1 | 1899 | 1
            Portrait of a Ferryman | painting | 1 | 1907 | 1
            Zimní řeka | painting | 2 | 1938 | 2
            Three Masks | sculpture | 2 | 1951 | 5
            Bather with a Jug | sculpture | 3 | 1878 | 5
            The Grain Market | painting | 3 | 1883 | 1
            Study of Oars | drawing | 3 | 1869 | 4
            Midnight Ferry | print | 4 | 1972 | 4
            Fjordlys | glass | 4 | 1981 | 7
            Flood Year | print | 4 | 1966 |
            The Miller's Daughter | painting | 5 | 1846 | 1
            View of the Old Bridge | drawing | 5 | 1839 | 4
            Ink Mountains | drawing | 6 | 1990 | 6
            River of Lanterns | painting | 6 | 2004 | 6
            La lavandera | painting | 7 | 1921 | 2
            Head of a Boatman | sculpture | 7 | 1934 | 5
            Déluge | painting | 8 | 1831 | 1
            The Toll Keeper | painting | 8 | 1844 |
            Onda verde | glass | 9 | 1988 | 7
            Lagoon Vessel | glass | 9 | 1995 | 7
            Broken Mooring | sculpture | 9 | 2001 | 3
            Factory on the Wisła | print | 10 | 1957 | 4
            Barge at Dusk | painting | 10 | 1949 | 2
            Tidal Machine | sculpture | 11 | 2015 | 3
            Plastic Delta | sculpture | 11 | 2019 |
            Nets I | print | 11 | 2008 | 6
            Nets II | print | 11 | 2009 | 6
            Clear Current | glass | 12 | 2018 | 7
            Diga | drawing | 12 | 2012 |
            Salt Steps | sculpture | 12 | 2020 | 3
        """,
            number(4, 240),
            after_year(4, "1954-01-01", "2022-12-31"),
            maybe(60, one_of("Harbour Bank", "Ida Lund", "Léon Picard")),
        ),
        "guide": rows("""
            Marek Toman | Czech | 2009-04-01
            Chantal Dubois | French | 2012-09-15
            Oskar Bergmann | German | 2016-02-01
            Lía Ferrer | Spanish | 2018-06-11
            Grace Whitcombe | English | 2005-01-10
            Jens Tveit | Norwegian | 2021-03-22
            Hiroko Sato | Japanese | 2022-05-02
            Peter Malone | English | 2019-10-07
        """),
        "tour": rows(
            60,
            ref("guide", but=(7,)),
            ref("room", but=(6, 8)),
            date("2022-03-01", "2023-10-31"),
            number(4, 32),
            maybe(25, number(25, 50, per=10)),
        ),
    },
    things=(
        Thing(
            "artist",
            "artist",
            "artists",
            "who",
            {"name": "name", "nationality": "nationality", "born": "year of birth"},
            (
                Filter("who are {}", "nationality = {}", ("Italian", "French")),
                Filter("who were born before {}", "born < {}", (1850, 1900)),
                Filter("who were born after {}", "born > {}", (1920, 1945)),
                Filter("who are still alive", "died IS NULL"),
                Filter("who died before {}", "died < {}", (1920, 1970)),
            ),
            (Measure("born", "youngest {} by year of birth", "earliest-born {}", date=True),),
            ("nationality",),
        ),
        Thing(
            "room",
            "room",
            "rooms",
            "that",
            {"name": "name", "floor": "floor", "area": "area"},
            (
                Filter("that are on floor {}", "floor = {}", (0, 1, 2)),
                Filter("that are larger than {} square metres", "area > {}", (90, 200)),
                Filter("that have no sponsor", "sponsor IS NULL"),
                Filter("that are sponsored by {}", "sponsor = {}", ("Harbour Bank",)),
            ),
            (Measure("area", "largest {}", "smallest {}", total=True),),
            ("floor",),
            "the {}",
        ),
        Thing(
            "exhibit",
            "exhibit",
            "exhibits",
            "that",
            {
                "title": "title",
                "kind": "kind",
                "year_made": "year of making",
                "value": "value",
                "acquired": "date of acquisition",
            },
            (
                Filter("that are of the kind {}", "kind = {}", ("painting", "sculpture", "print", "glass", "drawing")),
                Filter("that were made before {}", "year_made < {}", (1880, 1935)),
                Filter("that were made between {} and {}", "year_made BETWEEN {} AND {}", ((1900, 1960), (1980, 2010))),
                Filter("that are worth more than {} thousand euros", "value > {}", (100, 180)),
                Filter("that are worth less than {} thousand euros", "value < {}", (50, 90)),
                Filter("that were acquired after {}", "acquired > {}", ("1989-12-31", "2005-06-30")),
                Filter("that were acquired before {}", "acquired < {}", ("1970-01-01", "1980-01-01")),
                Filter("that were given by a donor", "donor IS NOT NULL"),
                Filter("that were donated by {}", "donor = {}", ("Ida Lund", "Léon Picard", "Harbour Bank")),
                Filter("that hang or stand in no room", "room_id IS NULL"),
                Filter("whose title begins with “The”", "title LIKE 'The %'"),
            ),
            (
                Measure("value", "most valuable {}", "least valuable {}", total=True),
                Measure("year_made", "most recently made {}", "oldest {}", date=True),
                Measure("acquired", "most recently acquired {}", "first acquired {}", date=True),
            ),
            ("kind",),
        ),
        Thing(
            "guide",
            "guide",
            "guides",
            "who",
            {"name": "name", "mother_tongue": "mother tongue", "since": "starting date"},
            (
                Filter("whose mother tongue is {}", "mother_tongue = {}", ("English", "French", "Czech")),
                Filter("who started after {}", "since > {}", ("2015-12-31", "2018-12-31")),
                Filter("who started before {}", "since < {}", ("2013-01-01", "2017-01-01")),
            ),
            (Measure("since", "newest {}", "longest-serving {}", date=True),),
        ),
        Thing(
            "tour",
            "tour",
            "tours",
            "that",
            {"tour_id": "tour id", "day": "day", "visitors": "number of visitors"},
            (
                Filter("that had more than {} visitors", "visitors > {}", (15, 24)),
                Filter("that had fewer than {} visitors", "visitors < {}", (10, 20)),
                Filter("that took place in 2022", "day LIKE '2022-%'"),
                Filter("that took place after {}", "day > {}", ("2022-12-31", "2023-05-31")),
                Filter("that were never rated", "rating IS NULL"),
                Filter(
                    "that took place between {} and {}",
                    "day BETWEEN {} AND {}",
                    (("2022-06-01", "2022-12-31"), ("2023-01-15", "2023-06-15")),
                ),
                Filter("that were rated above {}", "rating > {}", (3.5, 4.5)),
            ),
            (Measure("visitors", "{} with the most visitors", "{} with the fewest visitors", total=True),),
        ),
    ),
    links=(
        Link("exhibit", "artist_id", "artist", "made", "made", "that were made by"),
        Link("tour", "guide_id", "guide", "have led", "has led", "that were led by"),
        Link("tour", "room_id", "room", "have seen", "has seen", "that went to"),
    ),
    hard="""
Which exhibits stand in a room on the ground floor, floor 0? Give their titles and the names of the rooms.
    SELECT T1.title, T2.name FROM exhibit AS T1 JOIN room AS T2 ON T1.room_id = T2.room_id WHERE T2.floor = 0

For every room, empty ones included, how many exhibits does it hold?
    SELECT T1.name, COUNT(T2.exhibit_id) FROM room AS T1 LEFT JOIN exhibit AS T2 ON T1.room_id = T2.room_id
    GROUP BY T1.room_id

Which rooms hold no exhibit by a living artist? Give their names.
    SELECT name FROM room WHERE room_id NOT IN (SELECT T1.room_id FROM exhibit AS T1
    JOIN artist AS T2 ON T1.artist_id = T2.artist_id WHERE T2.died IS NULL AND T1.room_id IS NOT NULL)

How old did each artist who has died get, in years? Show the name and the difference of the years, highest first.
    SELECT name, died - born FROM artist WHERE died IS NOT NULL ORDER BY died - born DESC

Which artists died before they reached the age of 70, going by the years alone?
    SELECT name FROM artist WHERE died - born < 70

What is the most valuable exhibit of each kind? Show kind, title and value.
    SELECT T1.kind, T1.title, T1.value FROM exhibit AS T1
    WHERE T1.value = (SELECT MAX(T2.value) FROM exhibit AS T2 WHERE T2.kind = T1.kind)

Which artists have works in more than one room? Give their names.
    SELECT T1.name FROM artist AS T1 JOIN exhibit AS T2 ON T1.artist_id = T2.artist_id
    GROUP BY T1.artist_id HAVING COUNT(DISTINCT T2.room_id) > 1

Who has led tours through the Glass Room but never through the Rotunda?
    SELECT T1.name FROM guide AS T1 JOIN tour AS T2 ON T1.guide_id = T2.guide_id
    JOIN room AS T3 ON T2.room_id = T3.room_id WHERE T3.name = 'Glass Room'
    EXCEPT SELECT T1.name FROM guide AS T1 JOIN tour AS T2 ON T1.guide_id = T2.guide_id
    JOIN room AS T3 ON T2.room_id = T3.room_id WHERE T3.name = 'Rotunda'

What is the average rating of each guide's rated tours? List the names and averages of those above 3.8.
    SELECT T2.name, AVG(T1.rating) FROM tour AS T1 JOIN guide AS T2 ON T1.guide_id = T2.guide_id
    GROUP BY T2.guide_id HAVING AVG(T1.rating) > 3.8

How many tours have a rating, and what share of all tours is that in percent?
    SELECT COUNT(rating), 100.0 * COUNT(rating) / COUNT(*) FROM tour

Which nationalities are there among the artists whose works are in the Glass Room? List each once.
    SELECT DISTINCT T1.nationality FROM artist AS T1 JOIN exhibit AS T2 ON T1.artist_id = T2.artist_id
    JOIN room AS T3 ON T2.room_id = T3.room_id WHERE T3.name = 'Glass Room'

What is the total value, in thousand euros, of the exhibits in rooms sponsored by Harbour Bank?
    SELECT SUM(T1.value) FROM exhibit AS T1 JOIN room AS T2 ON T1.room_id = T2.room_id
    WHERE T2.sponsor = 'Harbour Bank'

Name everyone who sponsors a room or has donated an exhibit.
    SELECT sponsor FROM room WHERE sponsor IS NOT NULL UNION SELECT donor FROM exhibit WHERE donor IS NOT NULL

Which companies or people both sponsor a room and have donated an exhibit?
    SELECT sponsor FROM room WHERE sponsor IS NOT NULL INTERSECT SELECT donor FROM exhibit

In which year were the most tours held? Show the year and the number of tours.
    SELECT strftime('%Y', day), COUNT(*) FROM tour GROUP BY strftime('%Y', day) ORDER BY COUNT(*) DESC LIMIT 1

What were the years and titles of the works by Émilien Cordier, the earliest first?
    SELECT T1.year_made, T1.title FROM exhibit AS T1 JOIN artist AS T2 ON T1.artist_id = T2.artist_id
    WHERE T2.name = 'Émilien Cordier' ORDER BY T1.year_made
""",
)

CLINIC = Database(
    "hillside_clinic",
    schema="""\
CREATE TABLE doctor (
    doctor_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    field TEXT NOT NULL,
    hired DATE NOT NULL,
    salary INTEGER NOT NULL,
    supervisor_id INTEGER REFERENCES doctor (doctor_id)
);
CREATE TABLE patient (
    patient_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    birth_date DATE NOT NULL,
    village TEXT NOT NULL,
    insurer TEXT
);
CREATE TABLE appointment (
    appointment_id INTEGER PRIMARY KEY,
    doctor_id INTEGER NOT NULL REFERENCES doctor (doctor_id),
    patient_id INTEGER NOT NULL REFERENCES patient (patient_id),
    day DATE NOT NULL,
    minutes INTEGER NOT NULL,
    status TEXT NOT NULL
);
CREATE TABLE prescription (
    prescription_id INTEGER PRIMARY KEY,
    appointment_id INTEGER NOT NULL REFERENCES appointment (appointment_id),
    drug TEXT NOT NULL,
    daily_dose REAL NOT NULL,
    days INTEGER
);
""",
    rows={
        "doctor": rows("""
            Helena Sørby | cardiology | 2004-05-01 | 9800 |
            Bruno Castellani | paediatrics | 2009-11-16 | 8200 | 1
            Anand Krishnan | cardiology | 2014-03-03 | 7900 | 1
            Maëlle Perrin | dermatology | 2012-08-20 | 7600 | 1
            Olga Petrenko | surgery | 2007-01-15 | 9300 |
            Samuel Okafor | surgery | 2016-10-10 | 7700 | 5
            Keiko Hayashi | paediatrics | 2018-04-09 | 6900 | 2
            Rui Fonseca | general medicine | 2011-06-27 | 7100 | 5
            Agnieszka Kłos | general medicine | 2019-09-02 | 6400 | 8
            Liam Gallagher | dermatology | 2021-02-22 | 6100 | 4
            Nadia Haddou | general medicine | 2022-07-18 | 5900 | 8
        """),
        "patient": rows("""
            Arthur Nyberg | 1948-03-12 | Highmoor | Concordia
            Bettina Falk | 1975-07-29 | Highmoor | Alba Mutual
            Carlos Ibáñez | 1990-11-02 | Eskdale | Concordia
            Dagny Moen | 2015-05-18 | Eskdale |
            Elio Ferri | 1962-09-07 | Stonebridge | Alba Mutual
            Freya Thorne | 2009-01-23 | Stonebridge | Concordia
            Gül Yıldız | 1984-06-30 | Brackwater |
            Harriet Coombe | 1936-12-11 | Highmoor | Concordia
            Imran Sheikh | 1999-04-04 | Eskdale | Nordhelp
            Jolanta Mazur | 1957-08-16 | Brackwater | Nordhelp
            Kenji Mori | 1971-02-26 | Stonebridge | Alba Mutual
            Léa Bonnet | 2018-10-09 | Brackwater | Alba Mutual
            Magnus Eide | 1980-05-05 | Highmoor |
            Nuria Valdés | 1966-01-31 | Eskdale | Concordia
            Oskar Lind | 2003-03-15 | Stonebridge |
            Pia Rasmussen | 1993-07-07 | Brackwater | Nordhelp
            Quentin Marsh | 1951-11-20 | Highmoor | Concordia
            Renáta Vörös | 1988-09-13 | Eskdale | Alba Mutual
        """),
        "appointment": rows(
            80,
            ref("doctor", but=(11,)),
            ref("patient", but=(7, 15)),
            date("2023-01-09", "2023-12-20"),
            number(10, 60, 5),
            one_of("kept", "kept", "kept", "kept", "missed", "cancelled"),
        ),
        "prescription": rows(
            45,
            ref("appointment", having=(5, "kept")),
            one_of("Cardiolin", "Dermasol", "Febrex", "Febrex", "Somnavit", "Calmatol"),
            one_of(0.5, 1, 1, 2, 2, 3, 4),
            maybe(20, number(5, 60, 5)),
        ),
    },
    things=(
        Thing(
            "doctor",
            "doctor",
            "doctors",
            "who",
            {"name": "name", "field": "field", "hired": "hiring date", "salary": "salary"},
            (
                Filter("who work in {}", "field = {}", ("surgery", "cardiology", "general medicine")),
                Filter("who earn more than {}", "salary > {}", (7000, 7800)),
                Filter("who earn between {} and {}", "salary BETWEEN {} AND {}", ((6000, 7000), (7000, 8000))),
                Filter("who were hired before {}", "hired < {}", ("2010-01-01", "2013-01-01")),
                Filter("who were hired after {}", "hired > {}", ("2010-12-31", "2017-12-31")),
                Filter("who have no supervisor", "supervisor_id IS NULL"),
            ),
            (
                Measure("salary", "best-paid {}", "worst-paid {}", total=True),
                Measure("hired", "most recently hired {}", "longest-serving {}", date=True),
            ),
            ("field",),
        ),
        Thing(
            "patient",
            "patient",
            "patients",
            "who",
            {"name": "name", "village": "village", "birth_date": "date of birth"},
            (
                Filter("who live in {}", "village = {}", ("Highmoor", "Eskdale", "Stonebridge")),
                Filter("who are insured with {}", "insurer = {}", ("Concordia", "Alba Mutual", "Nordhelp")),
                Filter("who have no insurer", "insurer IS NULL"),
                Filter(
                    "who were born between {} and {}",
                    "birth_date BETWEEN {} AND {}",
                    (("1950-01-01", "1975-12-31"), ("1980-01-01", "2005-12-31")),
                ),
                Filter("who were born before {}", "birth_date < {}", ("1960-01-01", "1980-01-01")),
                Filter("who were born after {}", "birth_date > {}", ("1989-12-31", "2004-12-31")),
            ),
            (Measure("birth_date", "youngest {}", "oldest {}", date=True),),
            ("village",),
        ),
        Thing(
            "appointment",
            "appointment",
            "appointments",
            "that",
            {"appointment_id": "appointment id", "day": "day", "minutes": "length", "status": "status"},
            (
                Filter("that were {}", "status = {}", ("kept", "missed", "cancelled")),
                Filter("that were not kept", "status <> 'kept'"),
                Filter(
                    "that are dated between {} and {}",
                    "day BETWEEN {} AND {}",
                    (("2023-03-01", "2023-05-31"), ("2023-09-01", "2023-11-15")),
                ),
                Filter("that are longer than {} minutes", "minutes > {}", (30, 45)),
                Filter("that are shorter than {} minutes", "minutes < {}", (20, 30)),
                Filter("that are dated after {}", "day > {}", ("2023-06-30", "2023-10-31")),
                Filter("that are dated before {}", "day < {}", ("2023-04-01", "2023-08-01")),
            ),
            (Measure("minutes", "longest {}", "shortest {}", total=True),),
            ("status",),
        ),
        Thing(
            "prescription",
            "prescription",
            "prescriptions",
            "that",
            {"prescription_id": "prescription id", "drug": "drug", "daily_dose": "daily dose"},
            (
                Filter("that are for {}", "drug = {}", ("Febrex", "Cardiolin", "Dermasol")),
                Filter("that have a daily dose above {} g", "daily_dose > {}", (1, 2)),
                Filter("that have no end", "days IS NULL"),
                Filter("that last longer than {} days", "days > {}", (20, 40)),
            ),
            (Measure("daily_dose", "{} with the highest daily dose", "{} with the lowest daily dose"),),
            ("drug",),
        ),
    ),
    links=(
        Link("appointment", "doctor_id", "doctor", "have", "has", "that are with"),
        Link("appointment", "patient_id", "patient", "have", "has", "that were made by"),
    ),
    hard="""
Show each supervised doctor's name together with the name of the supervisor.
    SELECT T1.name, T2.name FROM doctor AS T1 JOIN doctor AS T2 ON T1.supervisor_id = T2.doctor_id

How many doctors does each supervisor have below them directly? List the supervisor's name and the number.
    SELECT T2.name, COUNT(*) FROM doctor AS T1 JOIN doctor AS T2 ON T1.supervisor_id = T2.doctor_id
    GROUP BY T2.doctor_id

Which doctors work in another field than their supervisor?
    SELECT T1.name FROM doctor AS T1 JOIN doctor AS T2 ON T1.supervisor_id = T2.doctor_id WHERE T1.field <> T2.field

Which doctors earn more than every doctor in general medicine? Give names and salaries.
    SELECT name, salary FROM doctor WHERE salary > (SELECT MAX(salary) FROM doctor WHERE field = 'general medicine')

In each field, who earns the most? Show the field and the name.
    SELECT T1.field, T1.name FROM doctor AS T1
    WHERE T1.salary = (SELECT MAX(T2.salary) FROM doctor AS T2 WHERE T2.field = T1.field)

Which patients have never had an appointment?
    SELECT T1.name FROM patient AS T1
    WHERE NOT EXISTS (SELECT * FROM appointment AS T2 WHERE T2.patient_id = T1.patient_id)

Which drugs have been prescribed to patients insured with Nordhelp? List each drug once.
    SELECT DISTINCT T3.drug FROM patient AS T1 JOIN appointment AS T2 ON T1.patient_id = T2.patient_id
    JOIN prescription AS T3 ON T2.appointment_id = T3.appointment_id WHERE T1.insurer = 'Nordhelp'

Name the doctors who have prescribed Febrex, and how many times each of them did.
    SELECT T1.name, COUNT(*) FROM doctor AS T1 JOIN appointment AS T2 ON T1.doctor_id = T2.doctor_id
    JOIN prescription AS T3 ON T2.appointment_id = T3.appointment_id WHERE T3.drug = 'Febrex' GROUP BY T1.doctor_id

Which doctors have prescribed Somnavit but not Calmatol?
    SELECT T1.name FROM doctor AS T1 JOIN appointment AS T2 ON T1.doctor_id = T2.doctor_id
    JOIN prescription AS T3 ON T2.appointment_id = T3.appointment_id WHERE T3.drug = 'Somnavit'
    EXCEPT SELECT T1.name FROM doctor AS T1 JOIN appointment AS T2 ON T1.doctor_id = T2.doctor_id
    JOIN prescription AS T3 ON T2.appointment_id = T3.appointment_id WHERE T3.drug = 'Calmatol'

How many appointments ended without any prescription?
    SELECT COUNT(*) FROM appointment WHERE appointment_id NOT IN (SELECT appointment_id FROM prescription)

For each insurer, how many patients has it? Show patients without an insurer as a group too.
    SELECT insurer, COUNT(*) FROM patient GROUP BY insurer

What percentage of the appointments were missed?
    SELECT 100.0 * (SELECT COUNT(*) FROM appointment WHERE status = 'missed') / COUNT(*) FROM appointment

How many appointments were 15, 30, 45 or 60 minutes long? Show each of these lengths with the number.
    SELECT minutes, COUNT(*) FROM appointment WHERE minutes IN (15, 30, 45, 60) GROUP BY minutes

Which patients have seen both Helena Sørby and Maëlle Perrin?
    SELECT T1.name FROM patient AS T1 JOIN appointment AS T2 ON T1.patient_id = T2.patient_id
    JOIN doctor AS T3 ON T2.doctor_id = T3.doctor_id WHERE T3.name = 'Helena Sørby'
    INTERSECT SELECT T1.name FROM patient AS T1 JOIN appointment AS T2 ON T1.patient_id = T2.patient_id
    JOIN doctor AS T3 ON T2.doctor_id = T3.doctor_id WHERE T3.name = 'Maëlle Perrin'

How many grams of each drug have been prescribed for a known number of days? Show drug and dose times days, summed.
    SELECT drug, SUM(daily_dose * days) FROM prescription GROUP BY drug

In which months of 2023 were there more than 8 appointments? Show the month as a two-digit number and the count.
    SELECT strftime('%m', day), COUNT(*) FROM appointment GROUP BY strftime('%m', day) HAVING COUNT(*) > 8

Which villages are home to patients born before 1940 or to patients insured with Nordhelp?
    SELECT village FROM patient WHERE birth_date < '1940-01-01' UNION
    SELECT village FROM patient WHERE insurer = 'Nordhelp'
""",
)

FOOTBALL = Database(
    "coastal_league",
    schema="""\
CREATE TABLE Club (
    Club_ID INTEGER PRIMARY KEY,
    Name TEXT NOT NULL,
    Town TEXT NOT NULL,
    Founded INTEGER NOT NULL,
    Stadium TEXT NOT NULL,
    Capacity INTEGER NOT NULL
);
CREATE TABLE Player (
    Player_ID INTEGER PRIMARY KEY,
    Name TEXT NOT NULL,
    Position TEXT NOT NULL,
    Club_ID INTEGER NOT NULL REFERENCES Club (Club_ID),
    Goals INTEGER NOT NULL,
    Birth_Date DATE NOT NULL,
    Height INTEGER NOT NULL,
    Nickname TEXT
);
CREATE TABLE Fixture (
    Fixture_ID INTEGER PRIMARY KEY,
    Home_ID INTEGER NOT NULL REFERENCES Club (Club_ID),
    Away_ID INTEGER NOT NULL REFERENCES Club (Club_ID),
    Day DATE NOT NULL,
    Home_Goals INTEGER NOT NULL,
    Away_Goals INTEGER NOT NULL,
    Attendance INTEGER
);
CREATE TABLE Sponsor (
    Sponsor_ID INTEGER PRIMARY KEY,
    Name TEXT NOT NULL,
    Industry TEXT NOT NULL
);
CREATE TABLE Deal (
    Deal_ID INTEGER PRIMARY KEY,
    Sponsor_ID INTEGER NOT NULL REFERENCES Sponsor (Sponsor_ID),
    Club_ID INTEGER NOT NULL REFERENCES Club (Club_ID),
    Amount INTEGER NOT NULL,
    Signed DATE NOT NULL,
    Ends DATE
);
""",
    rows={
        "Club": rows("""
            Porto Claro Rovers | Porto Claro | 1904 | Cliff Ground | 9200
            Sandhaven Athletic | Sandhaven | 1921 | Dune Park | 14500
            Étoile de Brume | Brume | 1932 | Stade des Phares | 11800
            Northquay United | Northquay | 1898 | Ropewalk | 21000
            FC Brännö | Brännö | 1946 | Havsvallen | 6400
            Saltmarsh Town | Saltmarsh | 1963 | Heron Lane | 7600
            Real Caleta | Caleta | 1919 | Campo del Faro | 17300
            Northquay Dockers | Northquay | 1951 | Crane Street | 8800
        """),
        "Player": rows(
            """
            Iker Mendizábal | forward | 7 | 14
            Jonas Wikström | forward | 5 | 17
            Tariq Bensaïd | midfielder | 3 | 6
            Callum Reid | defender | 4 | 2
            Duarte Pacheco | midfielder | 1 | 9
            Émeric Lavigne | forward | 3 | 19
            Finn Oduya | goalkeeper | 4 | 0
            Goran Matić | defender | 2 | 3
            Hugo Sandoval | midfielder | 7 | 7
            Ivan Dragomirov | goalkeeper | 2 | 0
            Jamie Thirlwell | forward | 4 | 12
            Kwame Asante | midfielder | 2 | 5
            Luca Ferrante | defender | 1 | 1
            Mads Kjeldsen | midfielder | 5 | 4
            Nikos Stavrou | forward | 6 | 11
            Owen Parry | defender | 6 | 2
            Pål Henriksen | goalkeeper | 5 | 0
            Quim Rovira | defender | 7 | 4
            Rory Callaghan | midfielder | 4 | 8
            Stéphane Diallo | defender | 3 | 1
            Tom Ashdown | goalkeeper | 6 | 1
            Uwe Brandt | forward | 2 | 13
            Vasco Leitão | forward | 1 | 10
            Will Hartnell | midfielder | 6 | 6
            Xavi Montoro | goalkeeper | 7 | 0
            Yannick Morel | goalkeeper | 3 | 0
            Zoltán Kis | midfielder | 4 | 3
            Ben Cordwainer | defender | 4 | 0
            Álvaro Nieto | forward | 7 | 16
            Danilo Prado | goalkeeper | 1 | 0
        """,
            date("1987-01-01", "2005-12-31"),
            number(166, 201),
            maybe(65, one_of("The Wall", "Rocket", "Professor", "Flaco", "Tank")),
        ),
        "Fixture": rows(
            56,
            ref("Club", but=(8,)),
            ref("Club", but=(8,), unlike=1),
            date("2023-08-12", "2024-05-18"),
            one_of(0, 0, 1, 1, 1, 2, 2, 3, 4),
            one_of(0, 0, 0, 1, 1, 2, 2, 3),
            maybe(12, number(1200, 6300, 50)),
        ),
        "Sponsor": rows("""
            Marea Foods | food
            Lindqvist Marine | shipping
            Café Aurore | food
            BlueTide Bank | finance
            Nordlys Energy | energy
            Hafen Logistik | shipping
            Solaris Gyms | sport
        """),
        "Deal": rows(
            24,
            ref("Sponsor", but=(7,)),
            ref("Club", but=(6,)),
            number(20, 480, 5),
            date("2018-01-01", "2023-06-30"),
            maybe(30, later(4, 365, 1460)),
        ),
    },
    things=(
        Thing(
            "Club",
            "club",
            "clubs",
            "that",
            {
                "Name": "name",
                "Town": "town",
                "Founded": "year of foundation",
                "Stadium": "stadium",
                "Capacity": "stadium capacity",
            },
            (
                Filter("that were founded before {}", "Founded < {}", (1920, 1940)),
                Filter("that were founded after {}", "Founded > {}", (1915, 1930)),
                Filter("that play in a stadium for more than {} people", "Capacity > {}", (8000, 12000)),
                Filter("that play in a stadium for fewer than {} people", "Capacity < {}", (9000, 15000)),
                Filter("that come from {}", "Town = {}", ("Northquay",)),
            ),
            (
                Measure("Capacity", "{} with the largest stadium", "{} with the smallest stadium"),
                Measure("Founded", "youngest {}", "oldest {}", date=True),
            ),
        ),
        Thing(
            "Player",
            "player",
            "players",
            "who",
            {
                "Name": "name",
                "Position": "position",
                "Birth_Date": "date of birth",
                "Height": "height",
                "Goals": "number of goals",
            },
            (
                Filter("who play as {}s", "Position = {}", ("forward", "midfielder", "defender", "goalkeeper")),
                Filter("who are taller than {} cm", "Height > {}", (180, 190)),
                Filter("who are shorter than {} cm", "Height < {}", (175, 185)),
                Filter("who are between {} and {} cm tall", "Height BETWEEN {} AND {}", ((175, 185), (180, 195))),
                Filter("who have scored more than {} goals", "Goals > {}", (5, 10)),
                Filter("who have scored fewer than {} goals", "Goals < {}", (4, 8)),
                Filter("who were born after {}", "Birth_Date > {}", ("1999-12-31", "2001-06-30")),
                Filter("who were born before {}", "Birth_Date < {}", ("1992-01-01", "1996-01-01")),
                Filter("who have a nickname", "Nickname IS NOT NULL"),
                Filter("who have no nickname", "Nickname IS NULL"),
                Filter("whose name ends in “o”", "Name LIKE '%o'"),
            ),
            (
                Measure("Goals", "{} with the most goals", "{} with the fewest goals", total=True),
                Measure("Height", "tallest {}", "shortest {}"),
                Measure("Birth_Date", "youngest {}", "oldest {}", date=True),
            ),
            ("Position",),
        ),
        Thing(
            "Fixture",
            "home match",
            "home matches",
            "that",
            {"Fixture_ID": "fixture id", "Day": "day", "Home_Goals": "number of home goals"},
            (
                Filter("that were won by the home side", "Home_Goals > Away_Goals"),
                Filter("that were won by the guests", "Home_Goals < Away_Goals"),
                Filter("that ended in a draw", "Home_Goals = Away_Goals"),
                Filter("that drew more than {} spectators", "Attendance > {}", (3000, 4500)),
                Filter("that were played before {}", "Day < {}", ("2023-11-01", "2024-01-01")),
                Filter("that were played after {}", "Day > {}", ("2024-01-31", "2024-03-31")),
                Filter("that have no recorded attendance", "Attendance IS NULL"),
            ),
            (Measure("Home_Goals", "{} with the most home goals", "{} with the fewest home goals", total=True),),
        ),
        Thing(
            "Sponsor",
            "sponsor",
            "sponsors",
            "that",
            {"Name": "name", "Industry": "industry"},
            (Filter("that belong to the {} industry", "Industry = {}", ("food", "shipping", "energy")),),
            (),
            ("Industry",),
        ),
        Thing(
            "Deal",
            "deal",
            "deals",
            "that",
            {"Deal_ID": "deal id", "Amount": "amount", "Signed": "signing date"},
            (
                Filter("that are worth more than {} thousand", "Amount > {}", (200, 350)),
                Filter("that are worth less than {} thousand", "Amount < {}", (100, 250)),
                Filter("that were signed after {}", "Signed > {}", ("2020-12-31", "2022-06-30")),
                Filter("that were signed before {}", "Signed < {}", ("2020-01-01", "2021-01-01")),
                Filter("that have no end date", "Ends IS NULL"),
            ),
            (
                Measure("Amount", "most lucrative {}", "least lucrative {}", total=True),
                Measure("Signed", "most recent {}", "oldest {}", date=True),
            ),
        ),
    ),
    links=(
        Link("Player", "Club_ID", "Club", "have", "has", "who play for"),
        Link("Fixture", "Home_ID", "Club", "have played", "has played", "that were played by"),
        Link("Deal", "Sponsor_ID", "Sponsor", "have signed", "has signed", "that were signed by"),
    ),
    hard="""
Show the names of the home club and the away club of each match that ended in a draw.
    SELECT T2.Name, T3.Name FROM Fixture AS T1 JOIN Club AS T2 ON T1.Home_ID = T2.Club_ID
    JOIN Club AS T3 ON T1.Away_ID = T3.Club_ID WHERE T1.Home_Goals = T1.Away_Goals

How many matches has each club won away? Show the club's name and the number, clubs without such a win left out.
    SELECT T2.Name, COUNT(*) FROM Fixture AS T1 JOIN Club AS T2 ON T1.Away_ID = T2.Club_ID
    WHERE T1.Away_Goals > T1.Home_Goals GROUP BY T2.Club_ID

Which clubs have played no match at all, neither at home nor away?
    SELECT Name FROM Club WHERE Club_ID NOT IN (SELECT Home_ID FROM Fixture UNION SELECT Away_ID FROM Fixture)

On which days were there matches with 6 goals or more, both sides together? Show the day and the number of goals.
    SELECT Day, Home_Goals + Away_Goals FROM Fixture WHERE Home_Goals + Away_Goals >= 6

Which players have scored more goals than the average player of their own position? Give name and position.
    SELECT T1.Name, T1.Position FROM Player AS T1
    WHERE T1.Goals > (SELECT AVG(T2.Goals) FROM Player AS T2 WHERE T2.Position = T1.Position)

Who is the top scorer of each club? Show the name of the club, the player and the number of goals.
    SELECT T2.Name, T1.Name, T1.Goals FROM Player AS T1 JOIN Club AS T2 ON T1.Club_ID = T2.Club_ID
    WHERE T1.Goals = (SELECT MAX(T3.Goals) FROM Player AS T3 WHERE T3.Club_ID = T1.Club_ID)

Which towns have more than one club?
    SELECT Town FROM Club GROUP BY Town HAVING COUNT(*) > 1

Which clubs have a contract with both a food sponsor and a shipping sponsor?
    SELECT T1.Name FROM Club AS T1 JOIN Deal AS T2 ON T1.Club_ID = T2.Club_ID
    JOIN Sponsor AS T3 ON T2.Sponsor_ID = T3.Sponsor_ID WHERE T3.Industry = 'food'
    INTERSECT SELECT T1.Name FROM Club AS T1 JOIN Deal AS T2 ON T1.Club_ID = T2.Club_ID
    JOIN Sponsor AS T3 ON T2.Sponsor_ID = T3.Sponsor_ID WHERE T3.Industry = 'shipping'

List the sponsors of Étoile de Brume, each with the amount of the deal in thousands, the largest amount first.
    SELECT T3.Name, T2.Amount FROM Club AS T1 JOIN Deal AS T2 ON T1.Club_ID = T2.Club_ID
    JOIN Sponsor AS T3 ON T2.Sponsor_ID = T3.Sponsor_ID WHERE T1.Name = 'Étoile de Brume' ORDER BY T2.Amount DESC

Which clubs get more than 600 thousand from all their deals together? Show the name and the sum in thousands.
    SELECT T2.Name, SUM(T1.Amount) FROM Deal AS T1 JOIN Club AS T2 ON T1.Club_ID = T2.Club_ID
    GROUP BY T2.Club_ID HAVING SUM(T1.Amount) > 600

Which industries do not sponsor Northquay United?
    SELECT Industry FROM Sponsor EXCEPT SELECT T1.Industry FROM Sponsor AS T1
    JOIN Deal AS T2 ON T1.Sponsor_ID = T2.Sponsor_ID JOIN Club AS T3 ON T2.Club_ID = T3.Club_ID
    WHERE T3.Name = 'Northquay United'

How many players play as forwards for clubs from Porto Claro or Caleta?
    SELECT COUNT(*) FROM Player AS T1 JOIN Club AS T2 ON T1.Club_ID = T2.Club_ID
    WHERE T1.Position = 'forward' AND T2.Town IN ('Porto Claro', 'Caleta')

What is the average attendance at each club's home matches? Show the club's name and the average.
    SELECT T2.Name, AVG(T1.Attendance) FROM Fixture AS T1 JOIN Club AS T2 ON T1.Home_ID = T2.Club_ID
    GROUP BY T2.Club_ID

For how many matches is the attendance known, and for how many is it not?
    SELECT COUNT(Attendance), COUNT(*) - COUNT(Attendance) FROM Fixture

Which players are called by a nickname that another player has as well? Show their names and nicknames.
    SELECT T1.Name, T1.Nickname FROM Player AS T1 WHERE EXISTS (SELECT * FROM Player AS T2
    WHERE T2.Nickname = T1.Nickname AND T2.Player_ID <> T1.Player_ID)

How many goals have the defenders of all clubs scored together, and how many the goalkeepers? Show position and sum.
    SELECT Position, SUM(Goals) FROM Player WHERE Position IN ('defender', 'goalkeeper') GROUP BY Position

Name the clubs that have a goalkeeper over 190 cm tall.
    SELECT T1.Name FROM Club AS T1 WHERE T1.Club_ID IN (SELECT T2.Club_ID FROM Player AS T2
    WHERE T2.Position = 'goalkeeper' AND T2.Height > 190)
""",
)

MEANS = (-10, 5, 45, 90, 140, 185, 210, 205, 155, 95, 40, 5)  # of the months, in tenths of a degree


def temperature(rng: Random, tables: Tables, row: Row) -> float:
    """A temperature for the month of the day in the row's column 2."""
    mean = MEANS[int(row[2][5:7]) - 1]
    return number(mean - 95, mean + 95, per=10)(rng, tables, row)


WEATHER = Database(
    "weather_network",
    schema="""\
CREATE TABLE observer (
    observer_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    profession TEXT NOT NULL,
    since DATE NOT NULL,
    phone TEXT
);
CREATE TABLE station (
    station_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    region TEXT NOT NULL,
    altitude INTEGER NOT NULL,
    installed INTEGER NOT NULL,
    observer_id INTEGER NOT NULL REFERENCES observer (observer_id)
);
CREATE TABLE reading (
    reading_id INTEGER PRIMARY KEY,
    station_id INTEGER NOT NULL REFERENCES station (station_id),
    day DATE NOT NULL,
    temperature REAL NOT NULL,
    wind INTEGER NOT NULL,
    rain REAL
);
CREATE TABLE alert (
    alert_id INTEGER PRIMARY KEY,
    station_id INTEGER NOT NULL REFERENCES station (station_id),
    kind TEXT NOT NULL,
    level INTEGER NOT NULL,
    issued DATE NOT NULL,
    lifted DATE
);
""",
    rows={
        "observer": rows("""
            Astrid Hellström | teacher | 1994-03-01 | 070-1101
            Borja Iturbe | farmer | 2003-10-15 |
            Clémence Roy | ranger | 2011-06-20 | 070-1188
            Dmitri Volkov | ranger | 2017-01-09 | 070-1203
            Eilidh MacRae | teacher | 2008-04-28 |
            Fuyuko Arai | retired | 2019-09-30 | 070-1240
            Gunnar Þórsson | farmer | 1999-12-12 | 070-1122
            Hilde Vanneste | retired | 2021-05-17 |
            Ibrahim Sow | engineer | 2015-02-02 | 070-1195
        """),
        "station": rows("""
            Windy Ridge | Highlands | 1420 | 1988 | 3
            Skogsbyn | Northwood | 310 | 1994 | 1
            Cap Rouge | Coast | 12 | 1979 | 5
            Puerto Gris | Coast | 6 | 2003 | 2
            Old Mill | Plains | 145 | 1966 | 7
            Þingbakki | Plains | 92 | 1999 | 7
            Eagle Saddle | Highlands | 1985 | 2017 | 4
            Moss Hollow | Northwood | 265 | 2011 | 3
            Lighthouse Point | Coast | 21 | 1958 | 5
            Threshing Field | Plains | 130 | 2019 | 7
            Upper Dam | Highlands | 1110 | 2015 | 9
            Birch Camp | Northwood | 402 | 2021 | 4
        """),
        "reading": rows(
            80,
            ref("station", but=(10,)),
            date("2023-01-01", "2023-12-31"),
            temperature,
            number(0, 96),
            maybe(18, one_of(0, 0, 0, 0.4, 1.2, 2.5, 3.8, 5.1, 7.4, 9.6, 12.3, 16.8, 21.5, 27.2, 33.9, 41.6)),
        ),
        "alert": rows(
            32,
            ref("station", but=(5, 10)),
            one_of("storm", "storm", "frost", "heat", "flood"),
            one_of(1, 1, 2, 2, 3),
            date("2023-01-01", "2023-12-20"),
            maybe(20, later(4, 1, 9)),
        ),
    },
    things=(
        Thing(
            "observer",
            "observer",
            "observers",
            "who",
            {"name": "name", "profession": "profession", "since": "starting date"},
            (
                Filter("who work as {}s", "profession = {}", ("teacher", "farmer", "ranger")),
                Filter("who started before {}", "since < {}", ("2005-01-01", "2012-01-01")),
                Filter("who started after {}", "since > {}", ("2009-12-31", "2016-06-30")),
                Filter("who have no telephone number", "phone IS NULL"),
            ),
            (Measure("since", "newest {}", "longest-serving {}", date=True),),
            ("profession",),
        ),
        Thing(
            "station",
            "station",
            "stations",
            "that",
            {"name": "name", "region": "region", "altitude": "altitude", "installed": "year of installation"},
            (
                Filter("that are in the region {}", "region = {}", ("Coast", "Highlands", "Plains", "Northwood")),
                Filter("that lie higher than {} metres", "altitude > {}", (300, 1000)),
                Filter("that lie lower than {} metres", "altitude < {}", (100, 300)),
                Filter("that were installed before {}", "installed < {}", (1980, 2000)),
                Filter("that were installed after {}", "installed > {}", (1990, 2010)),
            ),
            (
                Measure("altitude", "highest {}", "lowest {}"),
                Measure("installed", "newest {}", "oldest {}", date=True),
            ),
            ("region",),
        ),
        Thing(
            "reading",
            "reading",
            "readings",
            "that",
            {"reading_id": "reading id", "day": "day", "temperature": "temperature", "wind": "wind speed"},
            (
                Filter("that show a temperature below {} degrees", "temperature < {}", (0, -5, 10)),
                Filter("that show a temperature above {} degrees", "temperature > {}", (20, 24.5)),
                Filter("that show a wind speed over {} km/h", "wind > {}", (50, 75)),
                Filter("that show a wind speed under {} km/h", "wind < {}", (15, 40)),
                Filter("that lack a figure for rain", "rain IS NULL"),
                Filter("that show between {} and {} degrees", "temperature BETWEEN {} AND {}", ((-5, 5), (10, 20))),
                Filter("that show more than {} mm of rain", "rain > {}", (20, 30)),
                Filter("that were taken before {}", "day < {}", ("2023-03-01", "2023-06-01")),
                Filter("that were taken after {}", "day > {}", ("2023-08-31", "2023-10-31")),
            ),
            (
                Measure("temperature", "{} with the highest temperature", "{} with the lowest temperature"),
                Measure("wind", "windiest {}", "calmest {}"),
            ),
        ),
        Thing(
            "alert",
            "alert",
            "alerts",
            "that",
            {"alert_id": "alert id", "kind": "kind", "level": "level", "issued": "date of issue"},
            (
                Filter("that warned of {}", "kind = {}", ("storm", "frost", "heat", "flood")),
                Filter("that are of level {}", "level = {}", (1, 2, 3)),
                Filter("that have not been lifted", "lifted IS NULL"),
                Filter("that were issued after {}", "issued > {}", ("2023-06-30", "2023-09-30")),
                Filter("that were issued before {}", "issued < {}", ("2023-04-01", "2023-07-01")),
            ),
            (Measure("issued", "latest {}", "earliest {}", date=True),),
            ("kind", "level"),
        ),
    ),
    links=(
        Link("station", "observer_id", "observer", "look after", "looks after", "that are looked after by"),
        Link("reading", "station_id", "station", "have sent", "has sent", "that were sent by"),
        Link("alert", "station_id", "station", "have issued", "has issued", "that were issued by"),
    ),
    hard="""
Which stations have recorded both a temperature below -1.5 and one above 15 degrees?
    SELECT T1.name FROM station AS T1 JOIN reading AS T2 ON T1.station_id = T2.station_id WHERE T2.temperature < -1.5
    INTERSECT SELECT T1.name FROM station AS T1 JOIN reading AS T2 ON T1.station_id = T2.station_id
    WHERE T2.temperature > 15

How far apart are the highest and the lowest temperature read at each station? Show name and difference.
    SELECT T2.name, MAX(T1.temperature) - MIN(T1.temperature) FROM reading AS T1
    JOIN station AS T2 ON T1.station_id = T2.station_id GROUP BY T2.station_id

Which observers look after stations in more than one region?
    SELECT T1.name FROM observer AS T1 JOIN station AS T2 ON T1.observer_id = T2.observer_id
    GROUP BY T1.observer_id HAVING COUNT(DISTINCT T2.region) > 1

Who is responsible for the station with the strongest wind ever read? Give the observer's name and the wind speed.
    SELECT T3.name, T1.wind FROM reading AS T1 JOIN station AS T2 ON T1.station_id = T2.station_id
    JOIN observer AS T3 ON T2.observer_id = T3.observer_id ORDER BY T1.wind DESC LIMIT 1

How many readings from stations in the Highlands lack a figure for rain?
    SELECT COUNT(*) FROM reading AS T1 JOIN station AS T2 ON T1.station_id = T2.station_id
    WHERE T2.region = 'Highlands' AND T1.rain IS NULL

What is the total rainfall read in each region? Show the wettest region first.
    SELECT T2.region, SUM(T1.rain) FROM reading AS T1 JOIN station AS T2 ON T1.station_id = T2.station_id
    GROUP BY T2.region ORDER BY SUM(T1.rain) DESC

Name the observers none of whose stations has ever issued an alert.
    SELECT name FROM observer WHERE observer_id NOT IN (SELECT T1.observer_id FROM station AS T1
    JOIN alert AS T2 ON T1.station_id = T2.station_id)

Which stations have sent readings but issued no alert?
    SELECT T1.name FROM station AS T1 JOIN reading AS T2 ON T1.station_id = T2.station_id
    EXCEPT SELECT T1.name FROM station AS T1 JOIN alert AS T2 ON T1.station_id = T2.station_id

What is the mean temperature of each month? Show the month as a two-digit number and the mean.
    SELECT strftime('%m', day), AVG(temperature) FROM reading GROUP BY strftime('%m', day)

Which alerts were lifted within 3 days of being issued? Show their ids and kinds.
    SELECT alert_id, kind FROM alert WHERE julianday(lifted) - julianday(issued) <= 3

Which kind of alert stays in force the longest on average? Leave out alerts that have not been lifted.
    SELECT kind FROM alert GROUP BY kind
    ORDER BY AVG(julianday(lifted) - julianday(issued)) DESC LIMIT 1

What are the names of the stations installed later than every station on the Coast?
    SELECT name FROM station WHERE installed > (SELECT MAX(installed) FROM station WHERE region = 'Coast')

In each region, which station lies highest? Show region, name and altitude.
    SELECT T1.region, T1.name, T1.altitude FROM station AS T1
    WHERE T1.altitude = (SELECT MAX(T2.altitude) FROM station AS T2 WHERE T2.region = T1.region)

On how many different days was a wind above 80 km/h read or an alert of level 3 issued?
    SELECT COUNT(*) FROM (SELECT day FROM reading WHERE wind > 80 UNION SELECT issued FROM alert WHERE level = 3)

For each observer who can be phoned, list the name and the number of stations, zero included.
    SELECT T1.name, COUNT(T2.station_id) FROM observer AS T1
    LEFT JOIN station AS T2 ON T1.observer_id = T2.observer_id WHERE T1.phone IS NOT NULL GROUP BY T1.observer_id

List the day and the temperature of every reading sent by Þingbakki, the warmest first.
    SELECT T1.day, T1.temperature FROM reading AS T1 JOIN station AS T2 ON T1.station_id = T2.station_id
    WHERE T2.name = 'Þingbakki' ORDER BY T1.temperature DESC

How many readings are known to be without any rain?
    SELECT COUNT(*) FROM reading WHERE rain = 0
""",
)

FARM = Database(
    "larch_farm",
    schema="""\
CREATE TABLE field (
    field_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    hectares REAL NOT NULL,
    soil TEXT NOT NULL,
    last_limed DATE
);
CREATE TABLE crop (
    crop_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    family TEXT NOT NULL,
    price_per_tonne INTEGER NOT NULL
);
CREATE TABLE harvest (
    harvest_id INTEGER PRIMARY KEY,
    field_id INTEGER NOT NULL REFERENCES field (field_id),
    crop_id INTEGER NOT NULL REFERENCES crop (crop_id),
    day DATE NOT NULL,
    tonnes REAL NOT NULL,
    grade TEXT
);
CREATE TABLE animal (
    animal_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    species TEXT NOT NULL,
    born DATE NOT NULL,
    weight INTEGER NOT NULL,
    field_id INTEGER REFERENCES field (field_id)
);
CREATE TABLE vet_visit (
    visit_id INTEGER PRIMARY KEY,
    animal_id INTEGER NOT NULL REFERENCES animal (animal_id),
    day DATE NOT NULL,
    reason TEXT NOT NULL,
    cost INTEGER NOT NULL
);
""",
    rows={
        "field": rows("""
            Long Acre | 8.4 | clay | 2019-11-03
            Church Piece | 3.2 | loam | 2021-10-12
            Bäckalund | 5.5 | peat |
            Upper Stones | 6.1 | chalk | 2017-03-28
            Gallows Hill | 9.7 | chalk |
            Duck Meadow | 2.6 | peat | 2022-09-19
            Old Orchard | 1.9 | loam | 2020-02-24
            Schäferwiese | 4.3 | loam | 2018-10-30
            The Wedge | 7.2 | clay |
            Far Corner | 3.8 | sand | 2016-11-15
        """),
        "crop": rows("""
            winter wheat | cereals | 212
            spring barley | cereals | 187
            oats | cereals | 176
            rapeseed | brassicas | 415
            turnips | brassicas | 64
            field beans | legumes | 238
            peas | legumes | 251
            potatoes | nightshades | 143
            linseed | flax | 468
        """),
        "harvest": rows(
            60,
            ref("field", but=(3, 7)),
            ref("crop", but=(9,)),
            either(*(date(f"{year}-06-20", f"{year}-10-10") for year in range(2019, 2024))),
            number(8, 212, per=10),
            maybe(25, one_of("A", "A", "B", "B", "C")),
        ),
        "animal": rows(
            """
            Clover | cow | 2016-04-11 | 612
            Brunhild | cow | 2018-03-02 | 588
            Margarita | cow | 2019-05-26 | 571
            Nutmeg | cow | 2021-02-14 | 466
            Señor Toro | bull | 2017-06-30 | 894
            Hamlet | pig | 2021-09-08 | 243
            Petunia | pig | 2020-12-01 | 231
            Truffle | pig | 2022-07-19 | 158
            Löckchen | sheep | 2019-03-21 | 74
            Wooster | sheep | 2020-04-04 | 81
            Snowdrop | sheep | 2021-03-30 | 69
            Åsa | sheep | 2018-04-17 | 77
            Biscuit | goat | 2019-08-12 | 52
            Heidi | goat | 2022-03-05 | 44
            Old Tom | horse | 2001-05-09 | 655
            Juniper | horse | 2012-06-16 | 538
            Pepper | pony | 2014-07-23 | 287
            Chestnut | pony | 2016-09-01 | 301
            Dolores | goat | 2017-10-27 | 57
            Barnaby | bull | 2020-01-18 | 803
        """,
            maybe(20, ref("field", but=(5, 10))),
        ),
        "vet_visit": rows(
            48,
            ref("animal", but=(4, 12, 18)),
            date("2021-01-10", "2023-12-10"),
            one_of("vaccination", "vaccination", "lameness", "check-up", "check-up", "injury", "calving"),
            number(25, 310),
        ),
    },
    things=(
        Thing(
            "field",
            "field",
            "fields",
            "that",
            {"name": "name", "hectares": "area", "soil": "soil"},
            (
                Filter("that have {} soil", "soil = {}", ("loam", "clay", "chalk", "peat")),
                Filter("that are larger than {} hectares", "hectares > {}", (4, 6)),
                Filter("that are smaller than {} hectares", "hectares < {}", (3.5, 5)),
                Filter("that have no recorded liming", "last_limed IS NULL"),
                Filter("that were last limed before {}", "last_limed < {}", ("2019-01-01", "2020-06-30")),
            ),
            (Measure("hectares", "largest {}", "smallest {}", total=True),),
            ("soil",),
        ),
        Thing(
            "crop",
            "crop",
            "crops",
            "that",
            {"name": "name", "family": "family", "price_per_tonne": "price per tonne"},
            (
                Filter("that belong to the {}", "family = {}", ("cereals", "brassicas", "legumes")),
                Filter("that fetch more than {} euros a tonne", "price_per_tonne > {}", (180, 230)),
                Filter("that fetch less than {} euros a tonne", "price_per_tonne < {}", (150, 200)),
            ),
            (Measure("price_per_tonne", "{} with the highest price per tonne", "{} with the lowest price per tonne"),),
            ("family",),
        ),
        Thing(
            "harvest",
            "harvest",
            "harvests",
            "that",
            {"harvest_id": "harvest id", "day": "day", "tonnes": "yield"},
            (
                Filter("that brought in more than {} tonnes", "tonnes > {}", (9, 15)),
                Filter("that brought in less than {} tonnes", "tonnes < {}", (4, 8)),
                Filter("that were graded {}", "grade = {}", ("A", "B", "C")),
                Filter("that have no grade", "grade IS NULL"),
                Filter(
                    "that took place between {} and {}",
                    "day BETWEEN {} AND {}",
                    (("2020-01-01", "2020-12-31"), ("2021-06-01", "2022-06-30")),
                ),
                Filter("that took place before {}", "day < {}", ("2020-12-31", "2022-01-01")),
                Filter("that took place after {}", "day > {}", ("2021-12-31", "2022-12-31")),
            ),
            (Measure("tonnes", "heaviest {}", "lightest {}", total=True),),
        ),
        Thing(
            "animal",
            "animal",
            "animals",
            "that",
            {"name": "name", "species": "species", "born": "date of birth", "weight": "weight"},
            (
                Filter("that weigh more than {} kg", "weight > {}", (200, 500)),
                Filter("that weigh less than {} kg", "weight < {}", (80, 250)),
                Filter("that weigh between {} and {} kg", "weight BETWEEN {} AND {}", ((50, 100), (200, 600))),
                Filter("that were born before {}", "born < {}", ("2016-01-01", "2019-01-01")),
                Filter("that were born after {}", "born > {}", ("2018-12-31", "2020-06-30")),
                Filter("that are in no field", "field_id IS NULL"),
                Filter("whose name begins with “B”", "name LIKE 'B%'"),
            ),
            (
                Measure("weight", "heaviest {}", "lightest {}", total=True),
                Measure("born", "youngest {}", "oldest {}", date=True),
            ),
            ("species",),
        ),
        Thing(
            "vet_visit",
            "vet visit",
            "vet visits",
            "that",
            {"visit_id": "visit id", "day": "day", "reason": "reason", "cost": "cost"},
            (
                Filter("that were made for a {}", "reason = {}", ("check-up", "vaccination")),
                Filter("that were not vaccinations", "reason <> 'vaccination'"),
                Filter("that cost more than {} euros", "cost > {}", (150, 240)),
                Filter("that cost less than {} euros", "cost < {}", (60, 120)),
                Filter("that took place in 2022", "day BETWEEN '2022-01-01' AND '2022-12-31'"),
                Filter("that took place after {}", "day > {}", ("2022-06-30", "2023-03-31")),
            ),
            (Measure("cost", "most expensive {}", "cheapest {}", total=True),),
            ("reason",),
        ),
    ),
    links=(
        Link("harvest", "field_id", "field", "have had", "has had", "that were gathered from"),
        Link("harvest", "crop_id", "crop", "have had", "has had", "that were of"),
        Link("vet_visit", "animal_id", "animal", "have had", "has had", "that were for"),
    ),
    hard="""
How many tonnes of each family of crops have been harvested? Show the family and the sum.
    SELECT T2.family, SUM(T1.tonnes) FROM harvest AS T1 JOIN crop AS T2 ON T1.crop_id = T2.crop_id GROUP BY T2.family

What would each harvest of rapeseed fetch at the price per tonne? List the day and the amount, the earliest day first.
    SELECT T1.day, T1.tonnes * T2.price_per_tonne FROM harvest AS T1 JOIN crop AS T2 ON T1.crop_id = T2.crop_id
    WHERE T2.name = 'rapeseed' ORDER BY T1.day

Which fields are empty of animals? Give their names.
    SELECT name FROM field WHERE field_id NOT IN (SELECT field_id FROM animal WHERE field_id IS NOT NULL)

Which animals stand on a field with loam? Show the name of the animal and that of the field.
    SELECT T1.name, T2.name FROM animal AS T1 JOIN field AS T2 ON T1.field_id = T2.field_id WHERE T2.soil = 'loam'

List every field with the number of animals on it, zero where there are none.
    SELECT T1.name, COUNT(T2.animal_id) FROM field AS T1 LEFT JOIN animal AS T2 ON T1.field_id = T2.field_id
    GROUP BY T1.field_id

Which animals are heavier than the average of their own species?
    SELECT T1.name FROM animal AS T1
    WHERE T1.weight > (SELECT AVG(T2.weight) FROM animal AS T2 WHERE T2.species = T1.species)

On which fields have both potatoes and oats been harvested?
    SELECT T1.name FROM field AS T1 JOIN harvest AS T2 ON T1.field_id = T2.field_id
    JOIN crop AS T3 ON T2.crop_id = T3.crop_id WHERE T3.name = 'potatoes'
    INTERSECT SELECT T1.name FROM field AS T1 JOIN harvest AS T2 ON T1.field_id = T2.field_id
    JOIN crop AS T3 ON T2.crop_id = T3.crop_id WHERE T3.name = 'oats'

Which crops have never been grown on Gallows Hill, going by the harvests?
    SELECT name FROM crop WHERE crop_id NOT IN (SELECT T1.crop_id FROM harvest AS T1
    JOIN field AS T2 ON T1.field_id = T2.field_id WHERE T2.name = 'Gallows Hill')

In which years were more than 120 tonnes harvested in all? Show the year and the tonnes.
    SELECT strftime('%Y', day), SUM(tonnes) FROM harvest GROUP BY strftime('%Y', day) HAVING SUM(tonnes) > 120

What is the harvest per hectare, over all years, on each field that has any? Show the field's name and the figure.
    SELECT T2.name, SUM(T1.tonnes) / T2.hectares FROM harvest AS T1 JOIN field AS T2 ON T1.field_id = T2.field_id
    GROUP BY T2.field_id

Which species has cost the most at the vet? Show the species and the total cost.
    SELECT T2.species, SUM(T1.cost) FROM vet_visit AS T1 JOIN animal AS T2 ON T1.animal_id = T2.animal_id
    GROUP BY T2.species ORDER BY SUM(T1.cost) DESC LIMIT 1

Name the animals that the vet has seen for lameness or an injury, each once.
    SELECT DISTINCT T1.name FROM animal AS T1 JOIN vet_visit AS T2 ON T1.animal_id = T2.animal_id
    WHERE T2.reason IN ('lameness', 'injury')

Which animals born before 2019 has the vet never seen?
    SELECT T1.name FROM animal AS T1 WHERE T1.born < '2019-01-01'
    AND NOT EXISTS (SELECT * FROM vet_visit AS T2 WHERE T2.animal_id = T1.animal_id)

List the names of the animals that contain an ö or begin with an Å.
    SELECT name FROM animal WHERE name LIKE '%ö%' OR name LIKE 'Å%'

How many of the harvests of cereals were graded, and how many were there altogether?
    SELECT COUNT(T1.grade), COUNT(*) FROM harvest AS T1 JOIN crop AS T2 ON T1.crop_id = T2.crop_id
    WHERE T2.family = 'cereals'

Give the names of the fields that share their soil with Schäferwiese, that field itself left out.
    SELECT name FROM field
    WHERE soil = (SELECT soil FROM field WHERE name = 'Schäferwiese') AND name <> 'Schäferwiese'

Which soils are found only on fields with a recorded liming?
    SELECT soil FROM field EXCEPT SELECT soil FROM field WHERE last_limed IS NULL
""",
)

FILMS = Database(
    "fjord_film_festival",
    schema="""\
CREATE TABLE director (
    director_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    country TEXT NOT NULL,
    birth_year INTEGER
);
CREATE TABLE film (
    film_id INTEGER PRIMARY KEY,
    title TEXT NOT NULL,
    director_id INTEGER NOT NULL REFERENCES director (director_id),
    genre TEXT NOT NULL,
    language TEXT NOT NULL,
    released INTEGER NOT NULL,
    minutes INTEGER NOT NULL,
    subtitles TEXT
);
CREATE TABLE venue (
    venue_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    seats INTEGER NOT NULL,
    open_air TEXT NOT NULL
);
CREATE TABLE screening (
    screening_id INTEGER PRIMARY KEY,
    film_id INTEGER NOT NULL REFERENCES film (film_id),
    venue_id INTEGER NOT NULL REFERENCES venue (venue_id),
    day DATE NOT NULL,
    start_time TEXT NOT NULL,
    tickets INTEGER NOT NULL,
    price REAL NOT NULL
);
CREATE TABLE prize (
    prize_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    amount INTEGER,
    film_id INTEGER REFERENCES film (film_id)
);
""",
    rows={
        "director": rows("""
            Sigrún Ólafsdóttir | Iceland | 1974
            Paul Abernathy | Canada | 1959
            Mercedes Quiroga | Argentina | 1981
            Arnaud Delisle | Canada | 1988
            Tuva Nystrøm | Norway |
            Kaito Ishiguro | Japan | 1967
            Ewa Sobczak | Poland | 1979
            Baptiste Garnier | France | 1952
            Leila Mansour | Tunisia | 1990
            Henrik Aas | Norway | 1945
            Rosa Benítez | Argentina |
            Marcin Górski | Poland | 1983
        """),
        "film": rows(
            """
            Glacier Post | 1 | drama | Icelandic | 2019
            Huldufólk | 1 | fantasy | Icelandic | 2022
            The Last Trawler | 2 | documentary | English | 2016
            Nine Hundred Lakes | 2 | documentary | English | 2021
            La hora del mate | 3 | comedy | Spanish | 2020
            Río abajo | 3 | drama | Spanish | 2023
            L'hiver de Maude | 4 | drama | French | 2018
            Poutine Express | 4 | comedy | French | 2022
            Saltbrenner | 5 | thriller | Norwegian | 2021
            Under the Ferry | 5 | thriller | Norwegian | 2023
            Moss and Paper | 6 | drama | Japanese | 2009
            The Umbrella Mender | 6 | comedy | Japanese | 2017
            Cicha zatoka | 7 | thriller | Polish | 2020
            Amber Road | 7 | documentary | Polish | 2023
            Un notaire à Brest | 8 | comedy | French | 1998
            Les vents contraires | 8 | drama | French | 2006
            The Date Harvest | 9 | documentary | Arabic | 2022
            Night Bus to Gabès | 9 | drama | Arabic | 2023
            Fyrvokteren | 10 | drama | Norwegian | 1987
            Torsk! | 10 | comedy | Norwegian | 1994
            Tango for Beginners | 11 | comedy | Spanish | 2015
            The Cartographer | 11 | fantasy | Spanish | 2021
            Żuraw | 12 | fantasy | Polish | 2019
            Coal Brothers | 12 | thriller | Polish | 2022
            Snow Accounts | 2 | thriller | English | 2011
        """,
            number(68, 164),
            maybe(30, one_of("English", "English", "Norwegian")),
        ),
        "venue": rows("""
            Harbour Cinema | 320 | no
            Fjord Stage | 650 | yes
            Café Projektor | 45 | no
            Town Hall | 210 | no
            Old Cannery | 140 | no
            Bryggen Deck | 400 | yes
            School Theatre | 95 | no
        """),
        "screening": rows(
            66,
            ref("film", but=(11, 19, 24)),
            ref("venue", but=(7,)),
            date("2023-08-04", "2023-08-20"),
            one_of("11:00", "14:30", "17:00", "19:15", "21:45"),
            number(8, 45),
            one_of(6, 8, 8, 9.5, 11, 12.5),
        ),
        "prize": rows("""
            Golden Cod | 15000 | 6
            Jury Prize | 8000 | 18
            Silver Oar | 5000 | 3
            Audience Award | | 8
            Best Debut | 3000 |
            Critics' Choice | | 6
            Fog Lantern | 2500 | 9
            Lifetime Honour | 1000 |
            Best Photography | 4000 | 2
            Best Script | 4500 | 13
            Youth Jury Star | | 8
            Best Documentary | 6000 | 17
        """),
    },
    things=(
        Thing(
            "director",
            "director",
            "directors",
            "who",
            {"name": "name", "country": "country"},
            (
                Filter("who come from {}", "country = {}", ("Norway", "Poland", "Argentina", "Canada")),
                Filter("who were born before {}", "birth_year < {}", (1960, 1975)),
                Filter("who were born after {}", "birth_year > {}", (1975, 1980)),
                Filter("whose year of birth is unknown", "birth_year IS NULL"),
            ),
            (),
            ("country",),
        ),
        Thing(
            "film",
            "film",
            "films",
            "that",
            {
                "title": "title",
                "genre": "genre",
                "language": "language",
                "released": "year of release",
                "minutes": "running time",
            },
            (
                Filter("that belong to the genre {}", "genre = {}", ("drama", "comedy", "thriller", "documentary")),
                Filter("that are in {}", "language = {}", ("Norwegian", "French", "Spanish", "Polish")),
                Filter("that were released before {}", "released < {}", (2000, 2012)),
                Filter("that were released after {}", "released > {}", (2018, 2021)),
                Filter(
                    "that were released between {} and {}", "released BETWEEN {} AND {}", ((2005, 2017), (2019, 2021))
                ),
                Filter("that run for more than {} minutes", "minutes > {}", (100, 130)),
                Filter("that run for less than {} minutes", "minutes < {}", (90, 110)),
                Filter("that have no subtitles", "subtitles IS NULL"),
                Filter("whose title begins with “The”", "title LIKE 'The %'"),
                Filter("that have subtitles in {}", "subtitles = {}", ("English", "Norwegian")),
            ),
            (
                Measure("minutes", "longest {}", "shortest {}", total=True),
                Measure("released", "newest {}", "oldest {}", date=True),
            ),
            ("genre", "language"),
            "“{}”",
        ),
        Thing(
            "venue",
            "venue",
            "venues",
            "that",
            {"name": "name", "seats": "number of seats"},
            (
                Filter("that are in the open air", "open_air = 'yes'"),
                Filter("that have a roof", "open_air = 'no'"),
                Filter("that have more than {} seats", "seats > {}", (100, 250)),
                Filter("that have fewer than {} seats", "seats < {}", (150, 350)),
            ),
            (Measure("seats", "largest {}", "smallest {}", total=True),),
        ),
        Thing(
            "screening",
            "screening",
            "screenings",
            "that",
            {
                "screening_id": "screening id",
                "day": "day",
                "start_time": "starting time",
                "tickets": "number of tickets",
            },
            (
                Filter("that sold more than {} tickets", "tickets > {}", (25, 38)),
                Filter("that sold fewer than {} tickets", "tickets < {}", (15, 30)),
                Filter("that start at {}", "start_time = {}", ("11:00", "19:15", "21:45")),
                Filter("that start later than {}", "start_time > {}", ("14:30", "17:00")),
                Filter("that cost less than {} euros", "price < {}", (8, 9)),
                Filter(
                    "that took place between {} and {}",
                    "day BETWEEN {} AND {}",
                    (("2023-08-06", "2023-08-09"), ("2023-08-11", "2023-08-15")),
                ),
                Filter("that cost more than {} euros", "price > {}", (9, 11.5)),
                Filter("that took place before {}", "day < {}", ("2023-08-08", "2023-08-12")),
                Filter("that took place after {}", "day > {}", ("2023-08-10", "2023-08-16")),
            ),
            (Measure("tickets", "{} with the most tickets", "{} with the fewest tickets", total=True),),
            ("start_time",),
        ),
    ),
    links=(
        Link("film", "director_id", "director", "have directed", "has directed", "that were directed by"),
        Link("screening", "film_id", "film", "have had", "has had", "that showed"),
        Link("screening", "venue_id", "venue", "have hosted", "has hosted", "that took place in"),
    ),
    hard="""
Which prizes have not been awarded to any film?
    SELECT name FROM prize WHERE film_id IS NULL

Show the title of each film that has won a prize, together with the prize's name.
    SELECT T2.title, T1.name FROM prize AS T1 JOIN film AS T2 ON T1.film_id = T2.film_id

Which films have won more than one prize? Give the title and the number of prizes.
    SELECT T2.title, COUNT(*) FROM prize AS T1 JOIN film AS T2 ON T1.film_id = T2.film_id
    GROUP BY T2.film_id HAVING COUNT(*) > 1

Name the directors whose films have won no prize.
    SELECT name FROM director WHERE director_id NOT IN (SELECT T1.director_id FROM film AS T1
    JOIN prize AS T2 ON T1.film_id = T2.film_id)

How much prize money did each country's directors win? Show the country and the sum, the highest first.
    SELECT T3.country, SUM(T1.amount) FROM prize AS T1 JOIN film AS T2 ON T1.film_id = T2.film_id
    JOIN director AS T3 ON T2.director_id = T3.director_id
    GROUP BY T3.country ORDER BY SUM(T1.amount) DESC

What are the takings of each venue, tickets times price, over all screenings? Show the venue and the sum.
    SELECT T2.name, SUM(T1.tickets * T1.price) FROM screening AS T1 JOIN venue AS T2 ON T1.venue_id = T2.venue_id
    GROUP BY T2.venue_id

Which films were shown both in the Harbour Cinema and in Café Projektor?
    SELECT T1.title FROM film AS T1 JOIN screening AS T2 ON T1.film_id = T2.film_id
    JOIN venue AS T3 ON T2.venue_id = T3.venue_id WHERE T3.name = 'Harbour Cinema'
    INTERSECT SELECT T1.title FROM film AS T1 JOIN screening AS T2 ON T1.film_id = T2.film_id
    JOIN venue AS T3 ON T2.venue_id = T3.venue_id WHERE T3.name = 'Café Projektor'

Which films were never shown in the open air, though they were shown somewhere?
    SELECT T1.title FROM film AS T1 JOIN screening AS T2 ON T1.film_id = T2.film_id
    EXCEPT SELECT T1.title FROM film AS T1 JOIN screening AS T2 ON T1.film_id = T2.film_id
    JOIN venue AS T3 ON T2.venue_id = T3.venue_id WHERE T3.open_air = 'yes'

At how many screenings was less than a tenth of the venue's seats taken?
    SELECT COUNT(*) FROM screening AS T1 JOIN venue AS T2 ON T1.venue_id = T2.venue_id WHERE T1.tickets * 10 < T2.seats

List the directors who have made films in more than one genre.
    SELECT T1.name FROM director AS T1 JOIN film AS T2 ON T1.director_id = T2.director_id
    GROUP BY T1.director_id HAVING COUNT(DISTINCT T2.genre) > 1

Which is the longest film of each genre? Show the genre, the title and the running time.
    SELECT T1.genre, T1.title, T1.minutes FROM film AS T1
    WHERE T1.minutes = (SELECT MAX(T2.minutes) FROM film AS T2 WHERE T2.genre = T1.genre)

How many films are subtitled in each language, and how many are not subtitled at all? One row a language, one for none.
    SELECT subtitles, COUNT(*) FROM film GROUP BY subtitles

What are the titles of the films by Sigrún Ólafsdóttir, newest first?
    SELECT T1.title FROM film AS T1 JOIN director AS T2 ON T1.director_id = T2.director_id
    WHERE T2.name = 'Sigrún Ólafsdóttir' ORDER BY T1.released DESC

On which days of the festival were there at least 6 screenings? Show the day and the number.
    SELECT day, COUNT(*) FROM screening GROUP BY day HAVING COUNT(*) >= 6

Who was older than 40 when a film of theirs was released, going by the years? List each name once.
    SELECT DISTINCT T1.name FROM director AS T1 JOIN film AS T2 ON T1.director_id = T2.director_id
    WHERE T2.released - T1.birth_year > 40

Which titles contain an apostrophe or an exclamation mark?
    SELECT title FROM film WHERE title LIKE '%''%' OR title LIKE '%!%'

How many prizes carry more money than the average prize of known amount?
    SELECT COUNT(*) FROM prize WHERE amount > (SELECT AVG(amount) FROM prize)
""",
)

COURIERS = Database(
    "pedal_couriers",
    schema="""\
CREATE TABLE depot (
    depot_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    quarter TEXT NOT NULL,
    bays INTEGER NOT NULL
);
CREATE TABLE courier (
    courier_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    depot_id INTEGER NOT NULL REFERENCES depot (depot_id),
    bicycle TEXT NOT NULL,
    hired DATE NOT NULL,
    emergency_contact TEXT
);
CREATE TABLE customer (
    customer_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    trade TEXT NOT NULL,
    quarter TEXT NOT NULL,
    client_since DATE NOT NULL
);
CREATE TABLE parcel (
    parcel_id INTEGER PRIMARY KEY,
    customer_id INTEGER NOT NULL REFERENCES customer (customer_id),
    courier_id INTEGER REFERENCES courier (courier_id),
    sent DATE NOT NULL,
    delivered DATE,
    weight REAL NOT NULL,
    price REAL NOT NULL,
    fragile TEXT NOT NULL
);
CREATE TABLE repair (
    repair_id INTEGER PRIMARY KEY,
    courier_id INTEGER NOT NULL REFERENCES courier (courier_id),
    part TEXT NOT NULL,
    day DATE NOT NULL,
    cost INTEGER NOT NULL
);
""",
    rows={
        "depot": rows("""
            Canal Gate | Old Town | 12
            Südkreuz | Southside | 20
            Brewery Yard | Old Town | 8
            Gasworks | Southside | 6
            Markthalle | Harbourfront | 15
        """),
        "courier": rows(
            """
            Ana Belén Soto | 1 | cargo bike | 2017-04-03
            Björn Eklund | 2 | cargo bike | 2018-09-17
            Cyril Nguema | 2 | road bike | 2019-02-11
            Daisy Wren | 3 | fixed gear | 2020-06-29
            Emre Kaplan | 1 | e-bike | 2021-03-08
            Florence Okoye | 4 | e-bike | 2021-11-15
            Gérard Lemoine | 5 | cargo bike | 2016-05-23
            Hanna Schröder | 5 | road bike | 2022-01-31
            Isaac Feld | 2 | fixed gear | 2022-08-22
            Jiří Novotný | 3 | e-bike | 2023-02-06
            Kavya Pillai | 1 | road bike | 2023-05-15
            Lorcan Daly | 2 | e-bike | 2020-10-12
            Mina Farahani | 4 | cargo bike | 2023-07-03
        """,
            maybe(35, one_of("sister", "father", "flatmate", "partner")),
        ),
        "customer": rows("""
            Petit & Fils | florist | Old Town | 2016-08-01
            Doctor Vélo | bicycle shop | Southside | 2018-01-15
            Lawson Legal | law firm | Harbourfront | 2017-03-20
            Nadel und Faden | tailor | Old Town | 2020-09-07
            Smile Dental | dentist | Hillcrest | 2019-05-30
            Bücher Blum | bookshop | Southside | 2016-11-11
            Page One | bookshop | Harbourfront | 2021-06-18
            Kaffee Könke | café | Old Town | 2018-10-02
            Green Fork | restaurant | Harbourfront | 2022-02-24
            Studio Ōkami | photographer | Hillcrest | 2021-12-09
            Tooth & Co | dentist | Southside | 2023-01-16
            Rose Garden | florist | Hillcrest | 2020-04-22
        """),
        "parcel": rows(
            80,
            ref("customer", but=(11,)),
            maybe(10, ref("courier", but=(11, 13))),
            date("2023-02-10", "2023-11-30"),
            maybe(14, later(3, 0, 5)),
            number(2, 240, per=10),
            number(50, 390, 5, per=10),
            one_of("yes", "no", "no"),
        ),
        "repair": rows(
            30,
            ref("courier", but=(5, 8, 9, 10, 11, 13)),
            one_of("chain", "brake", "brake", "tyre", "tyre", "tyre", "battery", "saddle"),
            date("2022-01-10", "2023-12-10"),
            number(9, 180),
        ),
    },
    things=(
        Thing(
            "depot",
            "depot",
            "depots",
            "that",
            {"name": "name", "quarter": "quarter", "bays": "number of bays"},
            (
                Filter("that are in {}", "quarter = {}", ("Old Town", "Southside")),
                Filter("that have more than {} bays", "bays > {}", (10, 14)),
                Filter("that have fewer than {} bays", "bays < {}", (10, 13)),
            ),
            (Measure("bays", "{} with the most bays", "{} with the fewest bays", total=True),),
            ("quarter",),
            "the depot {}",
        ),
        Thing(
            "courier",
            "courier",
            "couriers",
            "who",
            {"name": "name", "bicycle": "kind of bicycle", "hired": "hiring date"},
            (
                Filter("whose bicycle is of the kind {}", "bicycle = {}", ("cargo bike", "e-bike", "road bike")),
                Filter("who were hired before {}", "hired < {}", ("2019-01-01", "2021-01-01")),
                Filter("who were hired after {}", "hired > {}", ("2020-12-31", "2022-06-30")),
                Filter("who have named no emergency contact", "emergency_contact IS NULL"),
            ),
            (Measure("hired", "most recently hired {}", "longest-serving {}", date=True),),
            ("bicycle",),
        ),
        Thing(
            "customer",
            "customer",
            "customers",
            "that",
            {"name": "name", "trade": "trade", "quarter": "quarter", "client_since": "date of becoming a client"},
            (
                Filter("that are in {}", "quarter = {}", ("Old Town", "Southside", "Harbourfront", "Hillcrest")),
                Filter("that became clients before {}", "client_since < {}", ("2018-12-31", "2021-01-01")),
                Filter("that became clients after {}", "client_since > {}", ("2017-12-31", "2020-06-30")),
                Filter("whose name contains “&”", "name LIKE '%&%'"),
            ),
            (Measure("client_since", "newest {}", "longest-standing {}", date=True),),
            ("quarter", "trade"),
        ),
        Thing(
            "parcel",
            "parcel",
            "parcels",
            "that",
            {"parcel_id": "parcel id", "sent": "sending date", "weight": "weight", "price": "price"},
            (
                Filter("that weigh more than {} kg", "weight > {}", (10, 18)),
                Filter("that weigh less than {} kg", "weight < {}", (4, 8)),
                Filter("that cost between {} and {} euros", "price BETWEEN {} AND {}", ((10, 20), (20, 30))),
                Filter("that cost more than {} euros", "price > {}", (25, 32)),
                Filter("that are fragile", "fragile = 'yes'"),
                Filter(
                    "that were sent between {} and {}",
                    "sent BETWEEN {} AND {}",
                    (("2023-03-15", "2023-05-31"), ("2023-07-01", "2023-08-31")),
                ),
                Filter("that have not been delivered", "delivered IS NULL"),
                Filter("that were sent after {}", "sent > {}", ("2023-06-30", "2023-09-30")),
                Filter("that were sent before {}", "sent < {}", ("2023-04-01", "2023-07-01")),
            ),
            (
                Measure("weight", "heaviest {}", "lightest {}", total=True),
                Measure("price", "most expensive {}", "cheapest {}", total=True),
            ),
        ),
        Thing(
            "repair",
            "repair",
            "repairs",
            "that",
            {"repair_id": "repair id", "part": "part", "day": "day", "cost": "cost"},
            (
                Filter("that concerned a {}", "part = {}", ("brake", "tyre", "chain")),
                Filter("that cost more than {} euros", "cost > {}", (60, 120)),
                Filter("that cost less than {} euros", "cost < {}", (40, 80)),
                Filter("that were done in 2022", "day LIKE '2022-%'"),
            ),
            (Measure("cost", "most expensive {}", "cheapest {}", total=True),),
            ("part",),
        ),
    ),
    links=(
        Link("courier", "depot_id", "depot", "have", "has", "who belong to"),
        Link("parcel", "customer_id", "customer", "have sent", "has sent", "that were sent by"),
        Link("repair", "courier_id", "courier", "have had", "has had", "that were needed by"),
    ),
    hard="""
Which parcels have no courier yet? Give their ids.
    SELECT parcel_id FROM parcel WHERE courier_id IS NULL

How many parcels has each courier taken on, couriers without any included? Show name and number.
    SELECT T1.name, COUNT(T2.parcel_id) FROM courier AS T1 LEFT JOIN parcel AS T2 ON T1.courier_id = T2.courier_id
    GROUP BY T1.courier_id

Which couriers have never taken on a parcel?
    SELECT name FROM courier WHERE courier_id NOT IN (SELECT courier_id FROM parcel WHERE courier_id IS NOT NULL)

What is the average time from sending to delivery, in days, of the parcels that have been delivered?
    SELECT AVG(julianday(delivered) - julianday(sent)) FROM parcel

How many parcels were delivered on the very day they were sent?
    SELECT COUNT(*) FROM parcel WHERE delivered = sent

Which customers have sent parcels with couriers from the depot Südkreuz? List each once.
    SELECT DISTINCT T1.name FROM customer AS T1 JOIN parcel AS T2 ON T1.customer_id = T2.customer_id
    JOIN courier AS T3 ON T2.courier_id = T3.courier_id JOIN depot AS T4 ON T3.depot_id = T4.depot_id
    WHERE T4.name = 'Südkreuz'

What did the parcels carried by the couriers of each depot bring in? Show the depot's name and the sum of the prices.
    SELECT T3.name, SUM(T1.price) FROM parcel AS T1 JOIN courier AS T2 ON T1.courier_id = T2.courier_id
    JOIN depot AS T3 ON T2.depot_id = T3.depot_id GROUP BY T3.depot_id

In which quarters are there customers but no depot?
    SELECT quarter FROM customer EXCEPT SELECT quarter FROM depot

Which quarters have a depot as well as a bookshop among the customers?
    SELECT quarter FROM depot INTERSECT SELECT quarter FROM customer WHERE trade = 'bookshop'

Who has carried both a parcel for Bücher Blum and one for Kaffee Könke?
    SELECT T1.name FROM courier AS T1 JOIN parcel AS T2 ON T1.courier_id = T2.courier_id
    JOIN customer AS T3 ON T2.customer_id = T3.customer_id WHERE T3.name = 'Bücher Blum'
    INTERSECT SELECT T1.name FROM courier AS T1 JOIN parcel AS T2 ON T1.courier_id = T2.courier_id
    JOIN customer AS T3 ON T2.customer_id = T3.customer_id WHERE T3.name = 'Kaffee Könke'

Which couriers have carried more than 60 kg in all? Show the name and the total weight.
    SELECT T2.name, SUM(T1.weight) FROM parcel AS T1 JOIN courier AS T2 ON T1.courier_id = T2.courier_id
    GROUP BY T2.courier_id HAVING SUM(T1.weight) > 60

List the ids of the fragile parcels that are heavier than the average parcel of the same customer.
    SELECT T1.parcel_id FROM parcel AS T1 WHERE T1.fragile = 'yes'
    AND T1.weight > (SELECT AVG(T2.weight) FROM parcel AS T2 WHERE T2.customer_id = T1.customer_id)

Show the price per kilogram of the 3 parcels that are dearest by it: id and price per kilogram, the dearest first.
    SELECT parcel_id, price / weight FROM parcel ORDER BY price / weight DESC LIMIT 3

Which kind of bicycle costs the most in repairs? Show the kind and the sum.
    SELECT T2.bicycle, SUM(T1.cost) FROM repair AS T1 JOIN courier AS T2 ON T1.courier_id = T2.courier_id
    GROUP BY T2.bicycle ORDER BY SUM(T1.cost) DESC LIMIT 1

Which couriers who were hired after Daisy Wren have had a battery repaired?
    SELECT T1.name FROM courier AS T1 WHERE T1.hired > (SELECT hired FROM courier WHERE name = 'Daisy Wren')
    AND EXISTS (SELECT * FROM repair AS T2 WHERE T2.courier_id = T1.courier_id AND T2.part = 'battery')

How many undelivered parcels has every customer that has at least 2 of them? Show the name and the number.
    SELECT T2.name, COUNT(*) FROM parcel AS T1 JOIN customer AS T2 ON T1.customer_id = T2.customer_id
    WHERE T1.delivered IS NULL GROUP BY T2.customer_id HAVING COUNT(*) >= 2

How many repairs were there in 2022 and how many in 2023? Show the year and the number.
    SELECT strftime('%Y', day), COUNT(*) FROM repair GROUP BY strftime('%Y', day)
""",
)

TRAIN = (LIBRARY, BAKERY, RAILWAY, MUSEUM, CLINIC, FOOTBALL, WEATHER, FARM, FILMS, COURIERS)
