"""The databases of the Spider set's development part, none of which is in the training part."""

from spider_spec import Database, Filter, Link, Measure, Thing, date, maybe, number, one_of, ref, rows, share_of

OBSERVATORY = Database(
    "summit_observatory",
    schema="""\
CREATE TABLE telescope (
    telescope_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    kind TEXT NOT NULL,
    aperture INTEGER NOT NULL,
    first_light DATE NOT NULL,
    retired DATE
);
CREATE TABLE astronomer (
    astronomer_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    institute TEXT NOT NULL,
    joined DATE NOT NULL,
    tutor_id INTEGER REFERENCES astronomer (astronomer_id)
);
CREATE TABLE target (
    target_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    kind TEXT NOT NULL,
    constellation TEXT NOT NULL,
    magnitude REAL NOT NULL,
    distance INTEGER
);
CREATE TABLE observation (
    observation_id INTEGER PRIMARY KEY,
    astronomer_id INTEGER NOT NULL REFERENCES astronomer (astronomer_id),
    telescope_id INTEGER NOT NULL REFERENCES telescope (telescope_id),
    target_id INTEGER NOT NULL REFERENCES target (target_id),
    night DATE NOT NULL,
    exposure INTEGER NOT NULL,
    seeing REAL
);
""",
    rows={
        "telescope": rows("""
            Grande Lunette | refractor | 60 | 1931-06-12 | 1994-10-01
            Twin Owl | reflector | 120 | 1968-03-30 |
            Åsgard | reflector | 250 | 1989-09-14 |
            Little Bear | refractor | 25 | 1957-11-05 |
            Dish One | radio | 1500 | 1975-05-21 | 2012-06-30
            Dish Two | radio | 2600 | 2009-08-08 |
            Four Winds | reflector | 90 | 1999-04-17 |
            Ojo del Puma | reflector | 380 | 2016-12-02 |
            Comet Seeker | reflector | 75 | 2004-02-19 |
        """),
        "astronomer": rows("""
            Valentina Corso | Istituto Alpino | 2001-09-01 |
            Rasmus Thorsen | Nordic College | 2006-02-15 |
            Nkechi Obi | Southern Academy | 2010-10-04 | 1
            Étienne Vasseur | Institut du Midi | 2012-03-19 | 1
            Yuki Tachibana | Nordic College | 2015-08-24 | 2
            Matías Luque | Southern Academy | 2017-01-09 | 3
            Greta Hoffmann | Nordic College | 2018-06-11 | 2
            Alun Prosser | Istituto Alpino | 2019-11-25 | 1
            Zofia Malik | Southern Academy | 2021-04-06 | 3
            Deepa Iyer | Institut du Midi | 2022-09-12 | 4
            Ólöf Einarsdóttir | Nordic College | 2023-01-30 | 7
        """),
        "target": rows("""
            Anvil Nebula | nebula | Carina | 6.4 | 7200
            Copper Star | star | Lyra | 2.1 | 64
            Veiled Twins | star | Gemini | 4.7 | 310
            Teardrop Galaxy | galaxy | Virgo | 9.8 |
            Far Lantern | galaxy | Virgo | 12.3 |
            Old Ember | star | Carina | 5.9 | 1450
            Ribbon Cloud | nebula | Cygnus | 7.2 | 2100
            Whisper Pulsar | pulsar | Lyra | 11.5 | 5800
            Halfpenny Cluster | cluster | Gemini | 3.6 | 920
            The Sieve | cluster | Cygnus | 5.1 | 3400
            Needle Galaxy | galaxy | Lyra | 10.6 |
            Blue Acorn | star | Cygnus | 3.3 | 228
            Stuttering Pulsar | pulsar | Carina | 13.4 | 9600
            Milk Jug Cluster | cluster | Carina | 6.9 | 5100
            Snail Nebula | nebula | Gemini | 8.5 | 3950
            Pale Hook | galaxy | Carina | 11.1 |
            Nuée d'Argent | nebula | Lyra | 9.1 | 4400
            Wanderer's Lamp | star | Virgo | 6.2 | 187
        """),
        "observation": rows(
            80,
            ref("astronomer", but=(10,)),
            ref("telescope", but=(1, 5)),
            ref("target", but=(4, 5, 14)),
            date("2023-02-01", "2024-01-31"),
            number(5, 240, 5),
            maybe(20, number(6, 32, per=10)),
        ),
    },
    things=(
        Thing(
            "telescope",
            "telescope",
            "telescopes",
            "that",
            {"name": "name", "kind": "kind", "aperture": "aperture", "first_light": "date of first light"},
            (
                Filter("that are of the kind {}", "kind = {}", ("reflector", "refractor", "radio")),
                Filter("that have an aperture above {} cm", "aperture > {}", (70, 200)),
                Filter("that have an aperture below {} cm", "aperture < {}", (100, 300)),
                Filter("that are still in use", "retired IS NULL"),
                Filter("that have been retired", "retired IS NOT NULL"),
                Filter("that saw first light before {}", "first_light < {}", ("1970-01-01", "1990-01-01")),
                Filter("that saw first light after {}", "first_light > {}", ("1988-12-31", "2003-12-31")),
            ),
            (
                Measure("aperture", "{} with the largest aperture", "{} with the smallest aperture"),
                Measure("first_light", "newest {}", "oldest {}", date=True),
            ),
            ("kind",),
            "the telescope {}",
        ),
        Thing(
            "astronomer",
            "astronomer",
            "astronomers",
            "who",
            {"name": "name", "institute": "institute", "joined": "joining date"},
            (
                Filter("who belong to the {}", "institute = {}", ("Nordic College", "Southern Academy")),
                Filter("who joined before {}", "joined < {}", ("2011-01-01", "2016-01-01")),
                Filter("who joined after {}", "joined > {}", ("2014-12-31", "2019-06-30")),
                Filter("who have no tutor", "tutor_id IS NULL"),
            ),
            (Measure("joined", "newest {}", "longest-standing {}", date=True),),
            ("institute",),
        ),
        Thing(
            "target",
            "target",
            "targets",
            "that",
            {"name": "name", "kind": "kind", "constellation": "constellation", "magnitude": "magnitude"},
            (
                Filter("that lie in {}", "constellation = {}", ("Carina", "Lyra", "Gemini", "Cygnus")),
                Filter("that are of the kind {}", "kind = {}", ("star", "galaxy", "nebula", "cluster")),
                Filter("that have a magnitude above {}", "magnitude > {}", (6.5, 9)),
                Filter("that have a magnitude below {}", "magnitude < {}", (5, 8)),
                Filter("that have a magnitude between {} and {}", "magnitude BETWEEN {} AND {}", ((3, 7), (6, 10))),
                Filter("whose distance is unknown", "distance IS NULL"),
                Filter("whose name contains “Cluster”", "name LIKE '%Cluster%'"),
                Filter("that are less than {} light years away", "distance < {}", (1000, 4000)),
                Filter("that are more than {} light years away", "distance > {}", (3000, 5500)),
            ),
            (Measure("magnitude", "{} with the highest magnitude", "{} with the lowest magnitude"),),
            ("kind", "constellation"),
        ),
        Thing(
            "observation",
            "observation",
            "observations",
            "that",
            {"observation_id": "observation id", "night": "night", "exposure": "exposure"},
            (
                Filter("that lasted longer than {} minutes", "exposure > {}", (90, 180)),
                Filter("that lasted less than {} minutes", "exposure < {}", (40, 120)),
                Filter("that were made before {}", "night < {}", ("2023-05-01", "2023-08-01")),
                Filter("that were made after {}", "night > {}", ("2023-06-30", "2023-10-31")),
                Filter("that have no record of the seeing", "seeing IS NULL"),
                Filter(
                    "that were made between {} and {}",
                    "night BETWEEN {} AND {}",
                    (("2023-03-01", "2023-05-31"), ("2023-09-01", "2023-12-15")),
                ),
                Filter("that had a seeing better than {}", "seeing < {}", (1, 1.5)),
            ),
            (Measure("exposure", "longest {}", "shortest {}", total=True),),
        ),
    ),
    links=(
        Link("observation", "astronomer_id", "astronomer", "have made", "has made", "that were made by"),
        Link("observation", "telescope_id", "telescope", "have served for", "has served for", "that were made with"),
        Link("observation", "target_id", "target", "have had", "has had", "that were of"),
    ),
    hard="""
Show the name of every astronomer who has a tutor, and the name of that tutor.
    SELECT T1.name, T2.name FROM astronomer AS T1 JOIN astronomer AS T2 ON T1.tutor_id = T2.astronomer_id

Which astronomers tutor somebody from another institute? List each once.
    SELECT DISTINCT T2.name FROM astronomer AS T1 JOIN astronomer AS T2 ON T1.tutor_id = T2.astronomer_id
    WHERE T1.institute <> T2.institute

Which astronomers are nobody's tutor?
    SELECT name FROM astronomer WHERE astronomer_id NOT IN (SELECT tutor_id FROM astronomer WHERE tutor_id IS NOT NULL)

How many years were the retired telescopes in use? Show the name and the number, going by the years of the dates.
    SELECT name, strftime('%Y', retired) - strftime('%Y', first_light) FROM telescope WHERE retired IS NOT NULL

What are the names of the targets that have been observed with the telescope Åsgard but never with Twin Owl?
    SELECT T1.name FROM target AS T1 JOIN observation AS T2 ON T1.target_id = T2.target_id
    JOIN telescope AS T3 ON T2.telescope_id = T3.telescope_id WHERE T3.name = 'Åsgard'
    EXCEPT SELECT T1.name FROM target AS T1 JOIN observation AS T2 ON T1.target_id = T2.target_id
    JOIN telescope AS T3 ON T2.telescope_id = T3.telescope_id WHERE T3.name = 'Twin Owl'

Which astronomers have observed both a pulsar and a cluster?
    SELECT T1.name FROM astronomer AS T1 JOIN observation AS T2 ON T1.astronomer_id = T2.astronomer_id
    JOIN target AS T3 ON T2.target_id = T3.target_id WHERE T3.kind = 'pulsar'
    INTERSECT SELECT T1.name FROM astronomer AS T1 JOIN observation AS T2 ON T1.astronomer_id = T2.astronomer_id
    JOIN target AS T3 ON T2.target_id = T3.target_id WHERE T3.kind = 'cluster'

How many hours of exposure has each kind of target had in all? Show the kind and the minutes divided by 60.
    SELECT T2.kind, SUM(T1.exposure) / 60.0 FROM observation AS T1 JOIN target AS T2 ON T1.target_id = T2.target_id
    GROUP BY T2.kind

Of the targets whose distance is known, which is the farthest away? Give its name and distance.
    SELECT name, distance FROM target ORDER BY distance DESC LIMIT 1

What is the name of the nearest target?
    SELECT name FROM target WHERE distance IS NOT NULL ORDER BY distance LIMIT 1

In each constellation, which target has the lowest magnitude? Show the constellation and the name.
    SELECT T1.constellation, T1.name FROM target AS T1
    WHERE T1.magnitude = (SELECT MIN(T2.magnitude) FROM target AS T2 WHERE T2.constellation = T1.constellation)

How many observations were made in each month? Show the month as YYYY-MM and the count, in the order of time.
    SELECT strftime('%Y-%m', night), COUNT(*) FROM observation GROUP BY strftime('%Y-%m', night)
    ORDER BY strftime('%Y-%m', night)

Which institutes' astronomers have used the telescope Ojo del Puma for over 300 minutes? Show institute and minutes.
    SELECT T1.institute, SUM(T2.exposure) FROM astronomer AS T1
    JOIN observation AS T2 ON T1.astronomer_id = T2.astronomer_id
    JOIN telescope AS T3 ON T2.telescope_id = T3.telescope_id
    WHERE T3.name = 'Ojo del Puma' GROUP BY T1.institute HAVING SUM(T2.exposure) > 300

Which kinds of target include one that has never been observed?
    SELECT DISTINCT T1.kind FROM target AS T1
    WHERE NOT EXISTS (SELECT * FROM observation AS T2 WHERE T2.target_id = T1.target_id)

How many of the targets in each constellation have a known distance? Show the constellation and the number.
    SELECT constellation, COUNT(distance) FROM target GROUP BY constellation

On how many different nights was the telescope Four Winds used?
    SELECT COUNT(DISTINCT T1.night) FROM observation AS T1 JOIN telescope AS T2 ON T1.telescope_id = T2.telescope_id
    WHERE T2.name = 'Four Winds'

What was the best seeing, that is the lowest, that each telescope has had? Show name and seeing.
    SELECT T2.name, MIN(T1.seeing) FROM observation AS T1 JOIN telescope AS T2 ON T1.telescope_id = T2.telescope_id
    GROUP BY T2.telescope_id

Name the targets with an apostrophe in their name.
    SELECT name FROM target WHERE name LIKE '%''%'
""",
)

SCHOOL = Database(
    "bridge_language_school",
    schema="""\
CREATE TABLE teacher (
    teacher_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    mother_tongue TEXT NOT NULL,
    hired DATE NOT NULL,
    hourly_rate INTEGER NOT NULL
);
CREATE TABLE course (
    course_id INTEGER PRIMARY KEY,
    title TEXT NOT NULL,
    language TEXT NOT NULL,
    level TEXT NOT NULL,
    teacher_id INTEGER NOT NULL REFERENCES teacher (teacher_id),
    lessons INTEGER NOT NULL,
    fee INTEGER NOT NULL,
    starts DATE NOT NULL,
    room TEXT
);
CREATE TABLE student (
    student_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    country TEXT NOT NULL,
    birth_date DATE NOT NULL,
    employer TEXT
);
CREATE TABLE enrolment (
    enrolment_id INTEGER PRIMARY KEY,
    course_id INTEGER NOT NULL REFERENCES course (course_id),
    student_id INTEGER NOT NULL REFERENCES student (student_id),
    enrolled DATE NOT NULL,
    paid INTEGER NOT NULL,
    grade INTEGER
);
""",
    rows={
        "teacher": rows("""
            Amélie Garnier | French | 2012-08-27 | 41
            Bogdan Ionescu | Romanian | 2015-01-12 | 36
            Carla Esposito | Italian | 2010-09-06 | 44
            Dong-hyun Seo | Korean | 2018-03-01 | 38
            Esther Mulder | Dutch | 2020-10-19 | 34
            Fionn O'Dowd | English | 2016-09-05 | 39
            Graciela Peña | Spanish | 2014-02-17 | 40
            Heike Baumann | German | 2008-04-14 | 46
            Inés Montalvo | Spanish | 2021-09-13 | 33
            John Sterling | English | 2022-01-10 | 32
        """),
        "course": rows(
            """
            French for Travellers | French | A1 | 1 | 20
            Le subjonctif | French | B2 | 1 | 12
            French Cinema | French | C1 | 1 | 10
            Buongiorno! | Italian | A1 | 3 | 24
            Italian Cookery Talk | Italian | B1 | 3 | 14
            Hangul in a Week | Korean | A1 | 4 | 15
            Korean Drama Club | Korean | B1 | 4 | 18
            Dutch at Work | Dutch | A2 | 5 | 30
            English Pronunciation | English | B1 | 6 | 12
            Business English | English | B2 | 5 | 28
            ¡Vamos! | Spanish | A1 | 7 | 24
            Español médico | Spanish | B2 | 7 | 16
            Cuentos cortos | Spanish | C1 | 9 | 12
            Spanish Refresher | Spanish | A2 | 9 | 18
            Deutsch für den Beruf | German | B2 | 8 | 30
            Grüß Gott | German | A1 | 8 | 24
            German Grammar Clinic | German | B1 | 8 | 16
            Exam Training English | English | C1 | 10 | 22
            English Tea Time | English | A2 | 10 | 8
            Small Talk in Spanish | Spanish | B1 | 3 | 10
        """,
            number(90, 480),
            date("2023-01-09", "2023-11-20"),
            maybe(25, one_of("Tower", "Tower", "Garden", "Bridge", "Attic")),
        ),
        "student": rows("""
            Agata Lis | Poland | 1996-05-14 | Hotel Astra
            Benoît Lacroix | Belgium | 1988-11-30 |
            Cem Aydın | Turkey | 2001-02-08 | Brightware
            Dalia Haddad | Lebanon | 1979-07-21 | St Anne Hospital
            Erik Sjöberg | Sweden | 1992-09-03 | Brightware
            Francesca Neri | Italy | 1985-12-17 |
            Gabriel Souza | Brazil | 1999-06-25 | Hotel Astra
            Hélène Petit | Belgium | 1969-03-12 |
            Ivana Kovač | Croatia | 1994-08-19 | St Anne Hospital
            José Carvalho | Brazil | 1982-01-05 | Brightware
            Katarzyna Wróbel | Poland | 2003-10-27 |
            Linnea Dahl | Sweden | 1977-04-09 | Hotel Astra
            Mehmet Kara | Turkey | 1990-12-01 |
            Nina Horvat | Croatia | 1998-07-07 | Brightware
            Otto Grünwald | Austria | 1961-05-31 |
            Piotr Sowa | Poland | 1986-02-22 | St Anne Hospital
            Rania Khoury | Lebanon | 2000-11-11 |
            Stefan Leitner | Austria | 1995-03-28 | Brightware
        """),
        "enrolment": rows(
            78,
            ref("course", but=(3, 8)),
            ref("student", but=(8, 17)),
            date("2022-11-01", "2023-10-31"),
            share_of("course", 1, 6, 100, 100, 90, 75, 50),
            maybe(22, number(41, 100)),
        ),
    },
    things=(
        Thing(
            "teacher",
            "teacher",
            "teachers",
            "who",
            {"name": "name", "mother_tongue": "mother tongue", "hired": "hiring date", "hourly_rate": "hourly rate"},
            (
                Filter("whose mother tongue is {}", "mother_tongue = {}", ("Spanish", "English")),
                Filter("who earn more than {} euros an hour", "hourly_rate > {}", (35, 39)),
                Filter("who earn less than {} euros an hour", "hourly_rate < {}", (37, 41)),
                Filter("who were hired before {}", "hired < {}", ("2013-01-01", "2016-01-01")),
                Filter("who were hired after {}", "hired > {}", ("2014-12-31", "2018-12-31")),
            ),
            (
                Measure("hourly_rate", "best-paid {}", "worst-paid {}"),
                Measure("hired", "most recently hired {}", "longest-serving {}", date=True),
            ),
        ),
        Thing(
            "course",
            "course",
            "courses",
            "that",
            {
                "title": "title",
                "language": "language",
                "level": "level",
                "lessons": "number of lessons",
                "fee": "fee",
                "starts": "starting date",
            },
            (
                Filter("that teach {}", "language = {}", ("English", "Spanish", "German", "French")),
                Filter("that are of level {}", "level = {}", ("A1", "B1", "B2")),
                Filter("that are of level A1 or A2", "level IN ('A1', 'A2')"),
                Filter("that have more than {} lessons", "lessons > {}", (15, 20)),
                Filter("that have at most {} lessons", "lessons <= {}", (12, 16)),
                Filter("that cost more than {} euros", "fee > {}", (250, 350)),
                Filter("that cost less than {} euros", "fee < {}", (180, 300)),
                Filter("that start before {}", "starts < {}", ("2023-05-01", "2023-07-01")),
                Filter("that start after {}", "starts > {}", ("2023-05-31", "2023-08-31")),
                Filter("that have no room yet", "room IS NULL"),
                Filter("whose title contains “English”", "title LIKE '%English%'"),
                Filter("that take place in the {} room", "room = {}", ("Tower", "Bridge")),
            ),
            (
                Measure("fee", "most expensive {}", "cheapest {}"),
                Measure("lessons", "{} with the most lessons", "{} with the fewest lessons", total=True),
                Measure("starts", "latest {} to start", "earliest {} to start", date=True),
            ),
            ("language", "level"),
            "“{}”",
        ),
        Thing(
            "student",
            "student",
            "students",
            "who",
            {"name": "name", "country": "country", "birth_date": "date of birth"},
            (
                Filter("who come from {}", "country = {}", ("Poland", "Brazil", "Sweden", "Turkey")),
                Filter("who were born before {}", "birth_date < {}", ("1980-01-01", "1990-01-01")),
                Filter("who were born after {}", "birth_date > {}", ("1991-12-31", "1997-06-30")),
                Filter("who work for {}", "employer = {}", ("Brightware", "Hotel Astra", "St Anne Hospital")),
                Filter("who have no employer", "employer IS NULL"),
                Filter(
                    "who were born between {} and {}",
                    "birth_date BETWEEN {} AND {}",
                    (("1975-01-01", "1989-12-31"), ("1990-01-01", "1996-12-31")),
                ),
            ),
            (Measure("birth_date", "youngest {}", "oldest {}", date=True),),
            ("country",),
        ),
        Thing(
            "enrolment",
            "enrolment",
            "enrolments",
            "that",
            {"enrolment_id": "enrolment id", "enrolled": "date of enrolment", "paid": "amount paid"},
            (
                Filter("that were graded above {}", "grade > {}", (70, 85)),
                Filter("that were graded below {}", "grade < {}", (60, 75)),
                Filter("that have no grade", "grade IS NULL"),
                Filter("that brought in more than {} euros", "paid > {}", (200, 300)),
                Filter("that brought in less than {} euros", "paid < {}", (100, 150)),
                Filter("that date from before {}", "enrolled < {}", ("2023-01-01", "2023-05-01")),
                Filter("that date from after {}", "enrolled > {}", ("2023-03-31", "2023-07-31")),
            ),
            (Measure("paid", "{} with the highest amount paid", "{} with the lowest amount paid", total=True),),
        ),
    ),
    links=(
        Link("course", "teacher_id", "teacher", "give", "gives", "that are given by"),
        Link("enrolment", "course_id", "course", "have had", "has had", "that are for"),
        Link("enrolment", "student_id", "student", "have made", "has made", "that were made by"),
    ),
    hard="""
Which courses has nobody enrolled in? Give their titles.
    SELECT title FROM course WHERE course_id NOT IN (SELECT course_id FROM enrolment)

Who teaches a language that is not the teacher's mother tongue? Give the teacher's name and the course's title.
    SELECT T1.name, T2.title FROM teacher AS T1 JOIN course AS T2 ON T1.teacher_id = T2.teacher_id
    WHERE T1.mother_tongue <> T2.language

Name the teachers who give no course at all.
    SELECT T1.name FROM teacher AS T1
    WHERE NOT EXISTS (SELECT * FROM course AS T2 WHERE T2.teacher_id = T1.teacher_id)

Which students have been taught by Heike Baumann? List each of them once.
    SELECT DISTINCT T1.name FROM student AS T1 JOIN enrolment AS T2 ON T1.student_id = T2.student_id
    JOIN course AS T3 ON T2.course_id = T3.course_id JOIN teacher AS T4 ON T3.teacher_id = T4.teacher_id
    WHERE T4.name = 'Heike Baumann'

Find the students who have enrolled for a Spanish course but never for an English one.
    SELECT T1.name FROM student AS T1 JOIN enrolment AS T2 ON T1.student_id = T2.student_id
    JOIN course AS T3 ON T2.course_id = T3.course_id WHERE T3.language = 'Spanish'
    EXCEPT SELECT T1.name FROM student AS T1 JOIN enrolment AS T2 ON T1.student_id = T2.student_id
    JOIN course AS T3 ON T2.course_id = T3.course_id WHERE T3.language = 'English'

Which students have taken both a German and an Italian course?
    SELECT T1.name FROM student AS T1 JOIN enrolment AS T2 ON T1.student_id = T2.student_id
    JOIN course AS T3 ON T2.course_id = T3.course_id WHERE T3.language = 'German'
    INTERSECT SELECT T1.name FROM student AS T1 JOIN enrolment AS T2 ON T1.student_id = T2.student_id
    JOIN course AS T3 ON T2.course_id = T3.course_id WHERE T3.language = 'Italian'

What is the average grade in each language? Show the language and the average, the best first.
    SELECT T2.language, AVG(T1.grade) FROM enrolment AS T1 JOIN course AS T2 ON T1.course_id = T2.course_id
    GROUP BY T2.language ORDER BY AVG(T1.grade) DESC

How many enrolments paid less than the fee of their course?
    SELECT COUNT(*) FROM enrolment AS T1 JOIN course AS T2 ON T1.course_id = T2.course_id WHERE T1.paid < T2.fee

Which courses cost more than the average course in the same language? Show title and language.
    SELECT T1.title, T1.language FROM course AS T1
    WHERE T1.fee > (SELECT AVG(T2.fee) FROM course AS T2 WHERE T2.language = T1.language)

What does one lesson of each Spanish course cost? Show the title and the fee divided by the lessons.
    SELECT title, 1.0 * fee / lessons FROM course WHERE language = 'Spanish'

In which languages is there no course of level A1?
    SELECT language FROM course EXCEPT SELECT language FROM course WHERE level = 'A1'

For each employer, how many of its people are students here? Leave out students without an employer.
    SELECT employer, COUNT(*) FROM student WHERE employer IS NOT NULL GROUP BY employer

Who has the best grade of all, and what is it?
    SELECT T2.name, T1.grade FROM enrolment AS T1 JOIN student AS T2 ON T1.student_id = T2.student_id
    ORDER BY T1.grade DESC LIMIT 1

Which students have an average grade of at least 75? Show the name and the average.
    SELECT T2.name, AVG(T1.grade) FROM enrolment AS T1 JOIN student AS T2 ON T1.student_id = T2.student_id
    GROUP BY T2.student_id HAVING AVG(T1.grade) >= 75

How many students were born in each decade? Show the first year of the decade, such as 1990, and the number.
    SELECT strftime('%Y', birth_date) / 10 * 10, COUNT(*) FROM student GROUP BY strftime('%Y', birth_date) / 10 * 10

Which countries do students of the course “Deutsch für den Beruf” come from? List each once.
    SELECT DISTINCT T1.country FROM student AS T1 JOIN enrolment AS T2 ON T1.student_id = T2.student_id
    JOIN course AS T3 ON T2.course_id = T3.course_id WHERE T3.title = 'Deutsch für den Beruf'

How much was paid, in all, for courses that have no room yet?
    SELECT SUM(T1.paid) FROM enrolment AS T1 JOIN course AS T2 ON T1.course_id = T2.course_id WHERE T2.room IS NULL
""",
)

GARDEN = Database(
    "lakeside_garden",
    schema="""\
CREATE TABLE glasshouse (
    glasshouse_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    climate TEXT NOT NULL,
    area INTEGER NOT NULL,
    built INTEGER NOT NULL,
    restored INTEGER
);
CREATE TABLE gardener (
    gardener_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    contract TEXT NOT NULL,
    started DATE NOT NULL,
    phone TEXT
);
CREATE TABLE plant (
    plant_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    family TEXT NOT NULL,
    origin TEXT NOT NULL,
    glasshouse_id INTEGER NOT NULL REFERENCES glasshouse (glasshouse_id),
    height INTEGER NOT NULL,
    planted DATE NOT NULL,
    donor TEXT
);
CREATE TABLE task (
    task_id INTEGER PRIMARY KEY,
    plant_id INTEGER NOT NULL REFERENCES plant (plant_id),
    gardener_id INTEGER NOT NULL REFERENCES gardener (gardener_id),
    kind TEXT NOT NULL,
    day DATE NOT NULL,
    minutes INTEGER
);
CREATE TABLE bloom (
    bloom_id INTEGER PRIMARY KEY,
    plant_id INTEGER NOT NULL REFERENCES plant (plant_id),
    opened DATE NOT NULL,
    blossoms INTEGER NOT NULL
);
""",
    rows={
        "glasshouse": rows("""
            Palm Hall | tropical | 860 | 1884 | 1996
            Orangerie | temperate | 420 | 1802 | 2004
            Cactus Loft | desert | 150 | 1971 |
            Fern Grotto | temperate | 95 | 1899 | 2011
            Water Lily House | tropical | 240 | 1912 |
            Alpine Cabin | alpine | 60 | 1988 |
            Serre Éloïse | tropical | 310 | 2014 |
            Seed Nursery | temperate | 75 | 2019 |
        """),
        "gardener": rows("""
            Álvaro Rincón | full-time | 2006-03-01 | 41-10
            Brigid Mahony | full-time | 2011-04-18 | 41-12
            Casper Nyholm | part-time | 2016-09-12 |
            Delphine Auclair | full-time | 2014-02-03 | 41-19
            Enzo Ricci | apprentice | 2022-08-01 |
            Fumiko Endo | part-time | 2019-05-20 | 41-22
            Günther Kahl | full-time | 1998-10-05 | 41-03
            Hawa Diarra | apprentice | 2023-08-01 |
            Ilse Verbeke | part-time | 2021-01-11 | 41-27
        """),
        "plant": rows(
            """
            Dwarf Coconut | palms | Philippines | 1 | 610
            Sugar Palm | palms | Indonesia | 1 | 780
            Traveller's Fan | bananas | Madagascar | 1 | 655
            Blue Java | bananas | Indonesia | 7 | 430
            Seville Orange | citrus | Spain | 2 | 320
            Bergamotto | citrus | Italy | 2 | 270
            Yuzu | citrus | Japan | 2 | 245
            Golden Barrel | cacti | Mexico | 3 | 85
            Bishop's Cap | cacti | Mexico | 3 | 28
            Queen of the Night | cacti | Mexico | 3 | 210
            Stone Plant | aizoons | South Africa | 3 | 4
            Royal Fern | ferns | Ireland | 4 | 150
            Staghorn | ferns | Australia | 4 | 95
            Bird's Nest Fern | ferns | Indonesia | 4 | 120
            Giant Lily | water lilies | Brazil | 5 | 35
            Pygmy Lily | water lilies | China | 5 | 12
            Sacred Lotus | lotuses | India | 5 | 140
            Edelweiss | daisies | Austria | 6 | 18
            Spring Gentian | gentians | Austria | 6 | 9
            Trumpet Gentian | gentians | Switzerland | 6 | 11
            Vanille bourbon | orchids | Madagascar | 7 | 505
            Moth Orchid | orchids | Philippines | 7 | 62
            Ghost Orchid | orchids | Cuba | 7 | 22
            Lady's Slipper | orchids | Switzerland | 6 | 45
            Pitahaya | cacti | Nicaragua | 7 | 315
            Kumquat | citrus | China | 2 | 230
            Fishtail Palm | palms | India | 1 | 540
            Açaí | palms | Brazil | 1 | 825
        """,
            date("1978-01-01", "2022-12-31"),
            maybe(55, one_of("Friends of the Garden", "Lena Sandström", "Université de Genève")),
        ),
        "task": rows(
            80,
            ref("plant", but=(13, 23)),
            ref("gardener", but=(8,)),
            one_of("watering", "watering", "watering", "pruning", "repotting", "feeding", "feeding"),
            date("2023-03-01", "2023-10-31"),
            maybe(15, number(5, 120)),
        ),
        "bloom": rows(40, ref("plant", but=(1, 12, 13, 14, 27)), date("2021-02-01", "2023-09-30"), number(1, 140)),
    },
    things=(
        Thing(
            "glasshouse",
            "glasshouse",
            "glasshouses",
            "that",
            {"name": "name", "climate": "climate", "area": "area", "built": "year of building"},
            (
                Filter("that have a {} climate", "climate = {}", ("tropical", "temperate")),
                Filter("that are larger than {} square metres", "area > {}", (100, 200)),
                Filter("that are smaller than {} square metres", "area < {}", (90, 250)),
                Filter("that were built before {}", "built < {}", (1900, 1975)),
                Filter("that were built after {}", "built > {}", (1910, 1980)),
                Filter("that have never been restored", "restored IS NULL"),
            ),
            (
                Measure("area", "largest {}", "smallest {}", total=True),
                Measure("built", "newest {}", "oldest {}", date=True),
            ),
            ("climate",),
            "the {}",
        ),
        Thing(
            "gardener",
            "gardener",
            "gardeners",
            "who",
            {"name": "name", "contract": "contract", "started": "starting date"},
            (
                Filter("who have a {} contract", "contract = {}", ("full-time", "part-time")),
                Filter("who started before {}", "started < {}", ("2012-01-01", "2017-01-01")),
                Filter("who started after {}", "started > {}", ("2013-12-31", "2018-12-31")),
                Filter("who have no phone", "phone IS NULL"),
            ),
            (Measure("started", "newest {}", "longest-serving {}", date=True),),
            ("contract",),
        ),
        Thing(
            "plant",
            "plant",
            "plants",
            "that",
            {
                "name": "name",
                "family": "family",
                "origin": "origin",
                "height": "height",
                "planted": "planting date",
            },
            (
                Filter("that belong to the {}", "family = {}", ("orchids", "cacti", "citrus", "palms", "ferns")),
                Filter("that come from {}", "origin = {}", ("Mexico", "Indonesia", "Madagascar", "China")),
                Filter("that are taller than {} cm", "height > {}", (200, 500)),
                Filter("that are between {} and {} cm tall", "height BETWEEN {} AND {}", ((20, 100), (200, 500))),
                Filter("that are shorter than {} cm", "height < {}", (30, 150)),
                Filter("that were planted before {}", "planted < {}", ("1990-01-01", "2000-01-01")),
                Filter("that were planted after {}", "planted > {}", ("2004-12-31", "2015-06-30")),
                Filter("that were given by {}", "donor = {}", ("Lena Sandström", "Université de Genève")),
                Filter("that have no donor", "donor IS NULL"),
                Filter("whose name contains “Orchid”", "name LIKE '%Orchid%'"),
            ),
            (
                Measure("height", "tallest {}", "shortest {}"),
                Measure("planted", "most recently planted {}", "longest-planted {}", date=True),
            ),
            ("family", "origin"),
        ),
        Thing(
            "task",
            "task",
            "tasks",
            "that",
            {"task_id": "task id", "kind": "kind", "day": "day"},
            (
                Filter("that consisted of {}", "kind = {}", ("watering", "pruning", "feeding", "repotting")),
                Filter("that took more than {} minutes", "minutes > {}", (45, 90)),
                Filter("that took less than {} minutes", "minutes < {}", (20, 60)),
                Filter("that were not timed", "minutes IS NULL"),
                Filter(
                    "that were done between {} and {}",
                    "day BETWEEN {} AND {}",
                    (("2023-04-01", "2023-06-15"), ("2023-07-10", "2023-09-10")),
                ),
                Filter("that were done before {}", "day < {}", ("2023-05-01", "2023-07-01")),
                Filter("that were done after {}", "day > {}", ("2023-06-30", "2023-09-15")),
            ),
            (),
            ("kind",),
        ),
        Thing(
            "bloom",
            "bloom",
            "blooms",
            "that",
            {"bloom_id": "bloom id", "opened": "opening date", "blossoms": "number of blossoms"},
            (
                Filter("that had more than {} blossoms", "blossoms > {}", (50, 100)),
                Filter("that had fewer than {} blossoms", "blossoms < {}", (30, 80)),
                Filter("that opened in 2022", "opened BETWEEN '2022-01-01' AND '2022-12-31'"),
                Filter("that opened after {}", "opened > {}", ("2022-03-31", "2023-01-31")),
                Filter("that opened before {}", "opened < {}", ("2022-01-01", "2022-08-01")),
            ),
            (Measure("blossoms", "richest {}", "poorest {}", total=True),),
        ),
    ),
    links=(
        Link("plant", "glasshouse_id", "glasshouse", "hold", "holds", "that grow in"),
        Link("task", "gardener_id", "gardener", "have done", "has done", "that were done by"),
        Link("bloom", "plant_id", "plant", "have had", "has had", "that were seen on"),
    ),
    hard="""
Which plants grow in glasshouses that have been restored since 2000? Show the plant's name and the glasshouse's.
    SELECT T1.name, T2.name FROM plant AS T1 JOIN glasshouse AS T2 ON T1.glasshouse_id = T2.glasshouse_id
    WHERE T2.restored >= 2000

Which glasshouse stands empty?
    SELECT name FROM glasshouse WHERE glasshouse_id NOT IN (SELECT glasshouse_id FROM plant)

Which gardeners have worked in the Palm Hall? Give each name once.
    SELECT DISTINCT T1.name FROM gardener AS T1 JOIN task AS T2 ON T1.gardener_id = T2.gardener_id
    JOIN plant AS T3 ON T2.plant_id = T3.plant_id JOIN glasshouse AS T4 ON T3.glasshouse_id = T4.glasshouse_id
    WHERE T4.name = 'Palm Hall'

Who has both pruned and repotted something?
    SELECT T1.name FROM gardener AS T1 JOIN task AS T2 ON T1.gardener_id = T2.gardener_id WHERE T2.kind = 'pruning'
    INTERSECT SELECT T1.name FROM gardener AS T1 JOIN task AS T2 ON T1.gardener_id = T2.gardener_id
    WHERE T2.kind = 'repotting'

Which gardeners have fed a plant from the citrus family but never watered one?
    SELECT T1.name FROM gardener AS T1 JOIN task AS T2 ON T1.gardener_id = T2.gardener_id
    JOIN plant AS T3 ON T2.plant_id = T3.plant_id WHERE T2.kind = 'feeding' AND T3.family = 'citrus'
    EXCEPT SELECT T1.name FROM gardener AS T1 JOIN task AS T2 ON T1.gardener_id = T2.gardener_id
    JOIN plant AS T3 ON T2.plant_id = T3.plant_id WHERE T2.kind = 'watering' AND T3.family = 'citrus'

Which plants have bloomed in two different years or more? List the name and the number of years.
    SELECT T2.name, COUNT(DISTINCT strftime('%Y', T1.opened)) FROM bloom AS T1
    JOIN plant AS T2 ON T1.plant_id = T2.plant_id
    GROUP BY T2.plant_id HAVING COUNT(DISTINCT strftime('%Y', T1.opened)) >= 2

What is the tallest plant of each family? Show the family, the plant's name and its height.
    SELECT T1.family, T1.name, T1.height FROM plant AS T1
    WHERE T1.height = (SELECT MAX(T2.height) FROM plant AS T2 WHERE T2.family = T1.family)

Which families have no plant that was given by a donor?
    SELECT family FROM plant EXCEPT SELECT family FROM plant WHERE donor IS NOT NULL

How many minutes were spent on each kind of task, counting only the timed ones? Show the kind and the sum.
    SELECT kind, SUM(minutes) FROM task GROUP BY kind

How many tasks were not timed, and what share of all tasks is that in percent?
    SELECT COUNT(*) - COUNT(minutes), 100.0 * (COUNT(*) - COUNT(minutes)) / COUNT(*) FROM task

In which months of 2023 were more than 12 tasks done? Show the month as a two-digit number and the count.
    SELECT strftime('%m', day), COUNT(*) FROM task GROUP BY strftime('%m', day) HAVING COUNT(*) > 12

Name the plants that have had neither a bloom nor any task.
    SELECT T1.name FROM plant AS T1 WHERE NOT EXISTS (SELECT * FROM bloom AS T2 WHERE T2.plant_id = T1.plant_id)
    AND NOT EXISTS (SELECT * FROM task AS T3 WHERE T3.plant_id = T1.plant_id)

Which climates have more than 6 plants in their glasshouses? Show the climate and the number of plants.
    SELECT T2.climate, COUNT(*) FROM plant AS T1 JOIN glasshouse AS T2 ON T1.glasshouse_id = T2.glasshouse_id
    GROUP BY T2.climate HAVING COUNT(*) > 6

What are the names and heights of the plants in the Serre Éloïse, from the tallest down?
    SELECT T1.name, T1.height FROM plant AS T1 JOIN glasshouse AS T2 ON T1.glasshouse_id = T2.glasshouse_id
    WHERE T2.name = 'Serre Éloïse' ORDER BY T1.height DESC

How many blossoms have the plants given by Université de Genève had altogether?
    SELECT SUM(T1.blossoms) FROM bloom AS T1 JOIN plant AS T2 ON T1.plant_id = T2.plant_id
    WHERE T2.donor = 'Université de Genève'

Which origins are represented in more than one glasshouse?
    SELECT origin FROM plant GROUP BY origin HAVING COUNT(DISTINCT glasshouse_id) > 1

List the gardeners who have done more tasks than Ilse Verbeke, with the number of their tasks.
    SELECT T2.name, COUNT(*) FROM task AS T1 JOIN gardener AS T2 ON T1.gardener_id = T2.gardener_id
    GROUP BY T2.gardener_id HAVING COUNT(*) > (SELECT COUNT(*) FROM task AS T3
    JOIN gardener AS T4 ON T3.gardener_id = T4.gardener_id WHERE T4.name = 'Ilse Verbeke')
""",
)

DEV = (OBSERVATORY, SCHOOL, GARDEN)
