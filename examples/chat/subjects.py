"""What the prompts are about, plain enough for a small model."""


def _listed(text: str) -> tuple[str, ...]:
    return tuple(" ".join(subject.split()) for subject in text.split(";") if subject.strip())


CONCEPTS = _listed("""
    evolution; magnetism; the greenhouse effect; inflation; supply and demand; photosynthesis in algae; a black hole;
    the water cycle; plate tectonics; electricity; nuclear fusion; the immune system; DNA; a virus; machine learning;
    a neural network; the stock market; democracy; the separation of powers; recursion; encryption; the blockchain;
    cloud computing; quantum mechanics; relativity; entropy; osmosis; the food chain; natural selection; climate change;
    renewable energy; a solar eclipse; tides; lightning; a rainbow; erosion; volcanoes; earthquakes; sound waves;
    the speed of light; friction; inertia; density; chemical bonds; acids and bases; fermentation; digestion;
    metabolism;
    the nervous system; memory; empathy; motivation; cognitive bias; the placebo effect; sleep cycles; stress;
    capitalism; socialism; globalisation; taxes; insurance; a mortgage; credit scores; budgeting; opportunity cost;
    irony; metaphor; alliteration; grammar; passive voice; a sonnet; impressionism; surrealism; jazz; a symphony;
    the internet; Wi-Fi; a web browser; an operating system; a compiler; version control; open source; a hash table;
    sorting algorithms; binary numbers; artificial intelligence; virtual reality; 3D printing; a search engine; GPS;
    probability; a prime number; fractions; algebra; calculus; the Pythagorean theorem; statistics; correlation;
""")

EVENTS_AND_PEOPLE = _listed("""
    the French Revolution; the Industrial Revolution; the Renaissance; the moon landing; the Cold War; the Silk Road;
    the Great Depression; the printing press; the Black Death; the fall of Constantinople; the Viking age; the Ottoman
    Empire; the Ming dynasty; the Inca Empire; the building of the pyramids; the Suez Canal; the Olympic Games;
    Albert Einstein; Isaac Newton; Leonardo da Vinci; Ada Lovelace; Alan Turing; Nelson Mandela; Mahatma Gandhi;
    Cleopatra; Napoleon; Alexander the Great; Queen Victoria; Abraham Lincoln; Martin Luther King; Rosa Parks;
    Charles Darwin; Galileo; Johannes Kepler; Nikola Tesla; Thomas Edison; Florence Nightingale; William Shakespeare;
    Jane Austen; Charles Dickens; Leo Tolstoy; Mozart; Beethoven; Bach; Frida Kahlo; Vincent van Gogh; Pablo Picasso;
    Socrates; Plato; Aristotle; Confucius; Genghis Khan; Marco Polo; Christopher Columbus; Amelia Earhart;
    Neil Armstrong;
""")

PLACES = _listed("""
    Japan; Brazil; Norway; Italy; Spain; Portugal; India; China; Vietnam; Morocco; South Africa; Argentina; Chile;
    Australia; Greece; Turkey; Ireland; Scotland; the Netherlands; Denmark; Finland; Austria; Croatia; Nepal; Indonesia;
    Tokyo; London; Paris; Berlin; New York; San Francisco; Lisbon; Vienna; Prague; Istanbul; Cairo; Sydney; Singapore;
    Barcelona; Amsterdam; Rome; Venice; Edinburgh; Stockholm; Buenos Aires; Mexico City; Bangkok; Seoul; Nairobi;
    the Amazon rainforest; the Sahara; the Alps; the Himalayas; the Grand Canyon; the Great Barrier Reef; Antarctica;
""")

ANIMALS_AND_PLANTS = _listed("""
    elephants; dolphins; owls; octopuses; ants; butterflies; wolves; tigers; kangaroos; penguin chicks; sharks; whales;
    bats; spiders; frogs; crocodiles; parrots; horses; cows; sheep; rabbits; hedgehogs; squirrels; foxes; bears; eagles;
    salmon; turtles; snakes; giraffes; lions; camels; oak trees; cacti; mushrooms; roses; sunflowers; bamboo; tulips;
""")

FOODS = _listed("""
    lasagna; vegetable soup; chicken curry; fried rice; an omelette; banana bread; chocolate cake; apple pie; hummus;
    guacamole; sushi; tacos; a Caesar salad; tomato sauce; mashed potatoes; risotto; pizza dough; lentil stew;
    sourdough;
    oatmeal cookies; a smoothie; iced tea; pad thai; ramen; chili; meatballs; stuffed peppers; a quiche; cheesecake;
""")

ACTIVITIES = _listed("""
    learn a new language; start a garden; save money; write a resume; prepare for a job interview; change a flat tire;
    meditate; lose weight; build muscle; sleep better; wake up early; read more books; write a novel; start a blog;
    learn to swim; play chess; play the piano; paint with watercolours; take better photos; edit a video; knit a scarf;
    clean a bathroom; remove a wine stain; iron a shirt; tie a tie; pack a suitcase; plan a wedding; organise a party;
    adopt a dog; care for a cat; keep houseplants alive; compost at home; reduce plastic waste; save water; recycle;
    write a thank-you note; apologise to a friend; deal with a difficult boss; ask for a raise; make new friends;
    overcome fear of flying; stop procrastinating; manage time; study for an exam; give a presentation; teach a child
    to read; fix a leaking tap; hang a picture; paint a room; assemble furniture; install Linux; back up a computer;
    set up a home network; start a podcast; invest money; buy a house; rent an apartment; choose a laptop;
    run a marathon;
""")

TRAITS = _listed("""
    cats and dogs; tea and coffee; cities and villages; books and films; trains and planes; Python and Java; Mac and
    Windows; summer and winter; renting and buying; running and swimming; butter and oil; gold and silver;
    wood and steel;
    solar power and wind power; viruses and worms; lists and tuples; TCP and UDP; frogs and toads; comets and asteroids;
    novels and short stories; savings accounts and bonds; baking and frying; alligators and crocodiles; fog and clouds;
    HTTP and HTTPS; a stack and a queue; a lawyer and a judge; weather and climate; mass and weight; speed and velocity;
    rabbits and hares; yoga and pilates; jazz and blues; ale and lager; electric cars and petrol cars;
    RAM and a hard disk;
""")

CHARACTERS = _listed("""
    a robot who learns to paint; a lost astronaut; a talking cat; a shy dragon; two rival bakers; a lonely lighthouse
    keeper; a girl who can speak to birds; a time-travelling historian; a detective in a small town; an old fisherman;
    a boy who finds a map; a queen without a kingdom; a ghost who is afraid of people; a clockmaker; a runaway train;
    the last tree on Earth; a mouse in a library; a knight who hates fighting; a forgotten toy; a musician in the rain;
    an unlucky magician; a postman on an island; a scientist who discovers a new colour; a family at the sea; a snowman
    who wants to see summer; a dog that saves a village; a chef who cannot taste; a spaceship with a sense of humour;
""")

NOTIONS = _listed("""
    friendship; the sea; autumn; the moon; home; hope; time; rain; a mountain; the first snow; a river; love; silence;
    the city at night; spring; a garden; childhood; freedom; the stars; courage; music; a storm; coffee; sunrise;
""")

LETTERS = _listed("""
    a colleague about a delayed project; my landlord about a broken heater; a customer who got the wrong order; my boss;
    to ask for a day off; a teacher about my child's absence; a hotel to cancel a booking; a friend to invite her to
    dinner; a team to announce a new office; a supplier to ask for a quote; a neighbour about loud music; an employee to
    congratulate her; a company to apply for an internship; a client to introduce our product; a bank about a lost card;
    a professor to ask for a recommendation; a newspaper about traffic; a landlord to end a lease; an old school friend;
""")

PROGRAMS = _listed("""
    reverses a string; checks whether a number is prime; finds the largest number in a list; counts the words in a text;
    sorts a list of numbers; computes Fibonacci numbers; removes duplicates from a list; reads a CSV file; sums the
    digits of a number; checks for palindromes; merges two sorted lists; converts Celsius to Fahrenheit; finds the;
    average of a list; counts vowels; prints a multiplication table; generates a random password; validates an email;
    finds common elements of two lists; flattens a nested list; capitalises every word; computes the greatest common
    divisor; searches a sorted list; downloads a web page; parses JSON; rolls two dice; prints a triangle of stars;
""")

LANGUAGES = _listed("Python; Python; Python; JavaScript; Java; C; Go; Rust; Ruby; SQL; Bash; TypeScript")

ROLES = _listed("""
    a tour guide in Athens; a medieval knight; a friendly doctor; a strict teacher; a wise old monk; a space captain;
    a sports coach; a museum guide; a chef in Paris; a weather presenter; a librarian; a Victorian detective;
    a salesman;
    a job interviewer; a fitness trainer; a grandmother; a philosopher; a stand-up comedian; a travel agent;
    a scientist;
""")

TEXTS = _listed("""
    The city council decided on Monday to close the old bridge for repairs. Drivers will have to take the ring road
    until May.;
    Many people think that breakfast is the most important meal of the day, but recent studies found little evidence.;
    Bees are in decline around the world. Scientists name pesticides, disease and the loss of flowers as the main
    causes.;
    Our team met on Friday to talk about the new website. The design is ready, but the texts are missing.;
    The museum opened a new hall for modern art this spring. It shows forty paintings, most of them by local artists.;
    Working from home saves time and money. It can also make it hard to stop working, and some people feel lonely.;
    The hikers left at dawn and reached the hut before noon. In the afternoon a storm came, so they stayed for the
    night.;
    Electric buses are quieter and cleaner than diesel buses. They cost more to buy, but less to run over ten years.;
    The novel tells of two sisters who inherit a vineyard. One wants to sell it, the other to keep it in the family.;
    Sleep helps the brain to store memories. People who sleep too little forget more and find it harder to concentrate.;
    The company reported higher sales in the third quarter, but its profit fell because the price of steel went up.;
    A new library will be built near the station. It will have a reading garden, a cafe and rooms for school classes.;
    The river was once so polluted that no fish lived in it. After thirty years of work, salmon have come back.;
    Coffee was first grown in Ethiopia. Traders brought it to Yemen, and from there it spread to the whole world.;
    The school will start half an hour later from next year on. Doctors had asked for this, since teenagers need sleep.;
    The old cinema was saved by its visitors. They collected money, repaired the roof and now run it as volunteers.;
""")

SENTENCES = _listed("""
    i has went to the store yesterday; The meeting was being attended by a lot of people; we need this done asap;
    She don't like apples and he don't neither; The cat sat on the mat; Me and him is going to the party tonight;
    I am very happy about the result; The weather is bad so we stay home; Your product is terrible and I want my money;
    back; He said that he will came tomorrow; It is what it is; I can't come to work today; They was late because of
    traffic; The movie was good; Please send me the report; I think you are wrong; There is many reasons for this
    problem; The food were delicious; Can you help me with this; The students works hard every day;
""")

WORDS = _listed("""
    resilience; ephemeral; serendipity; paradox; nostalgia; sustainable; ambiguous; pragmatic; gratitude; algorithm;
    hypothesis; catalyst; diligent; eloquent; frugal; integrity; jargon; kinetic; lucid; mundane; novice; obsolete;
""")

PHRASES = _listed("""
    Where is the train station?; I would like a coffee, please.; My name is Anna.; How much does this cost?; Thank you
    very much.; See you tomorrow.; I do not understand.; The book is on the table.; We are going to the beach.; Happy
    birthday!; I love music.; What time is it?; The children are playing in the garden.; It is raining today.;
""")
