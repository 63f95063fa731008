"""Sentences of the demo corpus, as templates.

`[a|b]` chooses one of the alternatives, which may nest; `<class>` draws a word of that lexicon section;
`{slot}` is a value the story keeps throughout (its hero, its place ...). `a(n)` becomes a or an by
the word after it. Each plot is a list of steps; a step is a list of alternative sentences.
"""

OPENINGS = [
    "[Once upon a time|Long ago|Many years ago|One <seasons>], a(n) <characters> {kind} named {hero} lived [in|near|beside] a(n) <looks> <places> [in|near|outside] {town}.",
    "[One|On a(n)] <weatheradjectives> <times>, {hero} the {kind} [<motion>|<motion> <adverbs>] [to|through|past] the <places> [of|near] {town}.",
    "[In|During] the [<weatheradjectives> <seasons>|month of <months>], there was a(n) <characters> {kind} called {hero}, who lived [in|by] the {place} of {town}.",
    "{hero} was a(n) <characters> [and|but] <characters> {kind} from {town}.",
    "There was once a(n) {kind} in {town} whose name was {hero}.",
    "It was a(n) <weatheradjectives> <times> in <months>, and {hero} the {kind} was <moods>.",
    "In the [old|little|quiet|busy] [village|town] of {town}, everybody knew {hero}, the <characters> {kind}.",
    "Every <weekdays> <times>, a(n) <characters> {kind} named {hero} [<motion>|<motion> <adverbs>] to the {place}.",
]

HABITS = [
    "{He} [kept|had|owned] a(n) <looks> <objects> and [<numbers> <objects:s>|a(n) <sizes> <colours> <objects>], and {he} [looked after them|counted them|dusted them] every <times>.",
    "{His} [best friend|neighbour|cousin|teacher|old friend] {friend} was a(n) <characters> {friendkind} who [made|sold|collected|mended|carved] <objects:s> [of|from] <materials>.",
    "{He} liked [<foods> and <foods>|<foods:s> with <foods>|to eat <foods:s>] [more than anything else|best of all|in the <seasons>].",
    "[Most days|On most <weekdays>s|When the weather was <weatheradjectives>], {he} [worked|sat|played|rested|read|sang] [in|near|by|behind] the {place} [until <times>|from <times> to <times>|with {friend}].",
    "{His} [house|home|cottage|room|workshop] was <sizes> and <looks>, with a(n) <colours> door and <numbers> <looks> [windows|chairs|shelves].",
    "Nobody in {town} could [sing|run|swim|cook|paint|dance|whistle|climb|tell stories|draw] as <adverbs> as {hero}.",
    "{He} had a(n) <sizes> <bodyparts>, <colours> [eyes|boots|gloves|buttons], and a(n) <looks> <objects> that {he} took everywhere.",
    "[The other|All the] <animals:s> and <roles:s> of {town} [thought|said|knew] that {he} was [very|rather|quite] <characters>.",
    "{He} was never <moods> for long, because {he} loved [the <weather>|the <plants:s>|the <sounds> of the <weather>|<colours> <plants:s>].",
]

LOST = [
    [
        "One <times>, {hero} [saw|noticed|discovered] that {his} {object} was gone.",
        "Then, on a(n) <weatheradjectives> <times>, {he} lost {his} {object}.",
        "But one <weekdays> {his} {object} [disappeared|vanished|was missing] from the <places>.",
    ],
    [
        "{He} looked [under|behind|inside] the <objects>, [behind|beneath|beside] the <objects>, and even [in|under] the <looks> <objects>, but {he} could not find it.",
        "{He} searched the <places> and the <places>, and found only a(n) <looks> <objects>.",
        '"Where is my {object}?" {he} <speech>. "I had it [this|yesterday] <times>."',
    ],
    [
        "{He} felt [very|so|rather] <moods>, for the {object} had [belonged to {his} <family>|been a gift from {his} <family>|been made by a(n) <roles> in {town2}].",
        "The {object} was <colours> and <looks>, and there was no other like it in {town}.",
        "Without the {object}, {he} could not [finish {his} work|go home|visit {his} <family>|sleep at night].",
    ],
    [
        "So {he} went to {friend} the {friendkind} and asked for help.",
        "{friend} the {friendkind} heard {him} and <motion> [over|out of the <places>|from the <places>].",
        "{He} <motion> <adverbs> to the <places>, where {friend} the {friendkind} was [mending|cleaning|painting|polishing] a(n) <looks> <objects>.",
    ],
    [
        '"I have not seen it," <speech> {friend}, "but [let us|we can|we should] look [together|near the {place}|by the <places>]."',
        '"Do not be <moods>," <speech> {friend}. "We will find your {object} before <times>."',
        '"A(n) <animals> [passed|ran by|flew over] with something <colours> this <times>," {friend} <speech> <adverbs>.',
    ],
    [
        "Together they [followed|saw] <sizes> footprints [along|past|across] the <places>, [through|over|around] the <places>, and up to a(n) <looks> <places>.",
        "They <motion> [through|across|past] the <places> while the <weather> [grew louder|began|came and went].",
        "They asked a(n) <characters> <roles>, a(n) <characters> <animals>, and <numbers> <animals:s>, and at last they came to the {place}.",
    ],
    [
        "There, [under|behind|beside] a(n) <sizes> <plants>, sat a(n) <moods> <animals> with the {object} in its [paws|nest|lap].",
        "There lay the {object}, [under|between] <numbers> <colours> <objects:s>, <looks> but safe.",
        "A(n) <characters> <animals> had [found|taken|borrowed] the {object} and was using it as a(n) [bed|hat|boat|drum|pillow|roof].",
    ],
    [
        '"[I am sorry|Forgive me|I did not know]," it <speech>. "I thought that [nobody wanted it|it was lost|it belonged to no one]."',
        "{hero} [laughed|smiled|cheered|jumped for joy] and thanked {friend} with all {his} heart.",
        "{friend} [laughed|smiled|clapped] and gave the {object} back to {hero}.",
    ],
]

GIFT = [
    [
        "It was nearly {friend}'s birthday, and {hero} wanted to [make|find|buy] a(n) {object} for {friendhim}.",
        "{hero} [promised|wished|decided] to make a(n) {object} for {friend} the {friendkind}.",
        "{friend} the {friendkind} was <moods>, so {hero} planned to give {friendhim} a(n) {object}.",
    ],
    [
        "{He} needed <materials>, [some|a little] <materials>, and a(n) <looks> <objects>.",
        "First {he} bought <colours> <materials> from the <roles> [at the market|in {town2}].",
        "But {he} had only <numbers> coins and a(n) <looks> <objects>.",
    ],
    [
        "{He} [worked|sat] in the <places> from <times> until <times>, and {he} <making> and <making> and <making>.",
        "{He} <making> it <adverbs>, while the <weather> [tapped on the roof|blew outside|made the windows rattle].",
        "All <times> {he} worked <adverbs>, with a <sounds> and a <sounds> and a <sounds>.",
    ],
    [
        "Then [the <materials> broke|the <objects> fell on the floor|a(n) <animals> spilled <foods> over it|it came out crooked], and {he} felt <moods>.",
        "But the first {object} was too <sizes>, and the second was too <looks>.",
        '"It is not [good|pretty|strong|straight] enough," {he} <speech>.',
    ],
    [
        'A(n) <characters> <roles> called {other} saw {him} and <speech>, "[Try|Start|Begin] again, and [go slowly|use <materials>|take your time|hold it like this]."',
        "{other} the <roles> showed {him} how to [use the <objects>|cut the <materials>|hold the <objects>|work more <adverbs>].",
        '"Nobody makes a(n) {object} well the first time," <speech> {other}, a(n) <characters> old <roles>.',
    ],
    [
        "So {hero} began again, and [by|before] <times> the {object} was <looks> and <looks>.",
        "{He} tried <numbers> times, and each time it was a little better.",
        "[At last|In the end|By <weekdays>] {he} held up a(n) <looks> {object} of <colours> <materials>.",
    ],
    [
        "When {friend} [saw|unwrapped|opened] it, {friendhe} was <moods> and <moods>.",
        "{friend} [hung it in|kept it in|carried it to] the {place} and showed it to every <roles> in {town}.",
        '"It is the most <looks> {object} in the world!" <speech> {friend}.',
    ],
]

STORM = [
    [
        "One <times> a(n) <sizes> <weather> came over {town}.",
        "Without warning, the sky turned <colours> and a(n) <weather> began.",
        "All through <months> there was nothing but <weather> and <weather>.",
    ],
    [
        "The <weather> [broke|carried away|covered|damaged] the <places>, the <places>, and <numbers> <looks> roofs.",
        "The <sounds> of the <weather> made the <animals:s> <moods>.",
        "Water filled the <places>, and the <animals:s> had to [climb|swim|hide] [in|to] the <places>.",
    ],
    [
        "{friend} the {friendkind} was [caught|trapped|stuck] in the {place} [with|without] {friendhis} {object}.",
        "Somebody was [shouting|calling] [from|near] the {place}. It was {friend} the {friendkind}!",
        '"{friend} is still [in|near|by] the {place}!" <speech> a(n) <moods> <roles>.',
    ],
    [
        "{hero} was <moods>, but {he} took a(n) <sizes> <objects> and <motion> into the <weather>.",
        "Although {he} was <moods>, {hero} <motion> <adverbs> toward the {place}.",
        "{hero} tied a(n) <looks> rope around {his} [waist|shoulder] and <motion> out.",
    ],
    [
        "The path was <weatheradjectives> and <looks>, and {he} fell <numbers> times.",
        "A(n) <animals> <motion> ahead of {him} and showed {him} the way [past|around|across] the <places>.",
        "{He} could see nothing but <colours> [clouds|shadows|water], and {he} followed the <sounds> of a(n) <objects>.",
    ],
    [
        '"[Hold on|Do not let go|Take my hand|Be brave]!" <speech> {hero}. "I am [here|coming]."',
        '"I knew that you would come," <speech> {friend} <adverbs>.',
        "{friend} held the <objects> <adverbs>, and {hero} pulled with all {his} strength.",
    ],
    [
        "[Step by step|Slowly|Hand in hand], they <motion> back to the <places>, where a(n) <roles> gave them <foods> and <colours> blankets.",
        "By <times> the <weather> was over, and they sat by the fire and <eating> <foods> and <foods>.",
        "When the sun came out, the <roles:s> of {town} [built|mended|cleaned] the <places> together.",
    ],
]

JOURNEY = [
    [
        "One day a(n) <roles> brought {him} a letter from {his} <family> in {town2}.",
        "{hero} had always wanted to see the {place} of {town2}.",
        "A(n) <characters> <animals> told {hero} about a(n) <looks> {object} [hidden|kept|buried] in the {place} of {town2}.",
    ],
    [
        "So {he} packed a(n) <looks> <objects>, <numbers> <foods:s>, and a(n) <objects>, and {he} set out at <times>.",
        "{He} put on a(n) <colours> [coat|cloak|hat|scarf] and <motion> away on a(n) <weatheradjectives> <times>.",
        '"I shall be back before <seasons>," {he} <speech> to {his} <family>.',
    ],
    [
        "On the [first|second|third] day {he} <motion> [over|across|along] a(n) <sizes> <places>.",
        "The road went past a(n) <looks> <places>, [over|under] a(n) <looks> bridge, and into a(n) <sizes> <places>.",
        "At <times> {he} slept under a(n) <sizes> <plants>, and the <animals:s> sang to {him}.",
    ],
    [
        "Beside a(n) <looks> <places> {he} met {friend}, a(n) <characters> {friendkind} with a(n) <looks> <objects>.",
        'There {he} saw a(n) {friendkind} who was [crying|resting|singing|fishing|lost]. "My name is {friend}," <speech> the {friendkind}.',
        "A(n) {friendkind} named {friend} was [waiting|sitting|sleeping] at the <places>.",
    ],
    [
        '"May I come with you?" {friend} <speech>. "I [know the way|am alone|can carry your <objects>|have <foods> to share]."',
        '"The way is long," <speech> {friend}, "but [two are better than one|I know a path through the <places>|I am not <moods>]."',
        "{hero} shared {his} <foods> with {friend}, and soon they were friends.",
    ],
    [
        "But a(n) <sizes> <places> lay across the road, and there was no [bridge|boat|path].",
        'Then a(n) <characters> <animals> [stood|sat] in front of them and <speech>, "[Nobody passes|Stop|Who are you]?"',
        "In the <places> they lost the path, and the <weather> made {hero} feel <moods>.",
    ],
    [
        "{friend} used the <objects> as a(n) [boat|bridge|sail|ladder|lamp], and they <motion> across <adverbs>.",
        "{hero} [sang a song|told a joke|gave it a(n) <foods>|asked <adverbs>], and at last they could go on.",
        "They followed the <sounds> of a(n) <animals> until they saw the lights of {town2}.",
    ],
    [
        "At last they came to the {place} of {town2}, where {his} <family> waited with <foods> and <foods>.",
        "In {town2} they found the {object}, and it was even more <looks> than the stories said.",
        "When they reached {town2}, every <roles> and <animals> came out to see them.",
    ],
]

CONTEST = [
    [
        "Every <seasons> there was a [contest|race|festival] [at|near] the {place} of {town}, and the prize was a(n) <looks> {object}.",
        "The mayor of {town} promised a(n) <looks> {object} to the best [singer|cook|runner|painter|swimmer|baker|storyteller] in town.",
        'A notice on the door of the <places> said: "[Race|Contest|Fair] on <weekdays>. The prize is a(n) {object}."',
    ],
    [
        "{hero} wanted to win, but {friend} the {friendkind} was [faster|stronger|older|louder|better].",
        '"I will win," <speech> {friend}, a(n) <characters> {friendkind}. "I always win."',
        "{hero} practised from <times> to <times>, in <weather> and in <weather>.",
    ],
    [
        '"You are too <sizes>," <speech> the <animals:s>, and {hero} felt <moods>.',
        "{His} <family> gave {him} <foods> and told {him} to [be patient|try {his} best|believe in {himself}].",
        "A(n) <characters> <roles> taught {him} to [breathe <adverbs>|begin <adverbs>|think before {he} moved|listen to the <weather>].",
    ],
    [
        "On the day of the contest, <numbers> <animals:s> and <numbers> <roles:s> came to watch.",
        "On <weekdays> the <groups> [sang|played|cheered], and the <roles> rang a(n) <looks> bell.",
        "It was a(n) <weatheradjectives> <times>, and everybody was <moods>.",
    ],
    [
        "{friend} began <adverbs>, but [then {friendhe} slipped on a(n) <foods>|soon {friendhe} was tired|{friendhe} stopped to eat a(n) <foods>].",
        "At first {hero} was last of all, behind a(n) <animals>, a(n) <animals>, and a(n) <animals>.",
        "Halfway along, {friend} fell and hurt {friendhis} <bodyparts>.",
    ],
    [
        "{hero} could have gone on alone, but {he} stopped and helped {friend} up.",
        "{hero} did not hurry; {he} <motion> <adverbs> and never stopped.",
        '"Come," <speech> {hero}. "We will finish together."',
    ],
    [
        "They came to the end at the same moment, and the mayor gave each of them half of the [prize|cake|crown].",
        "When it was over, the mayor gave the {object} to {hero}, and nobody cheered louder than {friend}.",
        "{hero} did not win the {object}, but {he} won a friend.",
    ],
]

SOUND = [
    [
        "One <times> {hero} heard a(n) [strange|loud|soft|curious|faint] <sounds> from the {place}.",
        "In the middle of the night there was a <sounds>, and then a <sounds>, and then nothing.",
        "A <sounds> came from [behind|under|inside] the <looks> <objects>.",
    ],
    [
        '"What was that?" <speech> {he}. "Is it a(n) <animals>, or a(n) <animals>?"',
        "{He} [lit a(n) <objects>|took {his} <objects>|woke {friend} the {friendkind}] and listened <adverbs>.",
        "{He} was a little <moods>, but {he} was also very curious.",
    ],
    [
        "{He} [called|fetched|woke] {friend} the {friendkind}, who was <moods> too.",
        '"I heard it as well," <speech> {friend} the {friendkind}. "It sounded like a(n) <sizes> <objects>."',
        "{friend} the {friendkind} <motion> beside {him} with a(n) <looks> <objects>.",
    ],
    [
        "They <motion> <adverbs> [past|around|behind] the <places> and looked [into|under|behind] a(n) <looks> <objects>.",
        "Step by step they <motion> through the <weatheradjectives> <places>.",
        "The <sounds> grew louder, and the <weather> [moved the <plants:s>|shook the door].",
    ],
    [
        "And what did they see? It was only a(n) <sizes> <animals> [asleep|stuck|dancing|singing|caught] in a(n) <looks> {object}!",
        "There sat <numbers> <sizes> <animals:s>, playing [on|with] a(n) <looks> {object}.",
        "Behind the <objects> they found a(n) <moods> <animals> that had hurt its <bodyparts>.",
    ],
    [
        '"[Please|Oh], do not be <moods>," it <speech>. "I [was only hungry|lost my way in the <weather>|wanted to sleep|could not get out]."',
        "{friend} laughed until {friendhis} <bodyparts> hurt, and {hero} laughed as well.",
        "{hero} gave it <foods> and <foods>, and it <eating> them <adverbs>.",
    ],
    [
        "From then on, the <animals> came to the {place} every <times>, and nobody was afraid of the <sounds> any more.",
        "They took it home, and it slept in the {object} until <seasons>.",
        "Since that night, {hero} has never been afraid of [the dark|a <sounds>|the {place}].",
    ],
]

SHARE = [
    [
        "That <seasons> there was little food in {town}, and {hero} had only <numbers> <foods:s> [left|in the <objects>].",
        "{hero} had a(n) <looks> <objects> full of <foods:s>, and {he} did not want to share.",
        "All <seasons> {hero} gathered <foods:s> and hid them in the {place}.",
    ],
    [
        "Then {friend} the {friendkind} came to the door, <moods> and <moods>.",
        "One <weatheradjectives> <times>, a(n) <characters> {friendkind} named {friend} knocked on the door.",
        "On the way home {he} met {friend}, a(n) {friendkind} who had eaten nothing since <weekdays>.",
    ],
    [
        '"[Please|Kind friend], may I have a(n) <foods>?" <speech> {friend}. "I have [walked|come] from {town2}."',
        '"I can give you my <looks> {object} for some <foods>," {friend} <speech> <adverbs>.',
        "{friend} did not ask for anything; {friendhe} only [looked at|smelled] the <foods>.",
    ],
    [
        "{hero} thought of the long <seasons> and felt <moods>.",
        'At first {he} <speech>, "No, I [have none|need them all|am hungry too]."',
        "{His} <family> had always told {him} that [nobody grows poor by giving|a shared <foods> tastes twice as good].",
    ],
    [
        "But {he} looked at {friend}'s <looks> [boots|coat|hat|shoes] and opened the door.",
        "Then {he} broke {his} last <foods> in two and gave the larger half to {friend}.",
        '"Come in," {he} <speech> at last. "There is enough for two."',
    ],
    [
        "They <eating> the <foods> together and talked until <times> about <goals:s> and <goals:s>.",
        "While they <eating>, {friend} told {him} a(n) <looks> story about a(n) <animals> and a(n) <objects>.",
        "In the morning {friend} was gone, but on the <objects> lay a(n) <looks> {object}.",
    ],
    [
        "When <seasons> came, {friend} returned with a cart full of <foods:s> and <foods:s>.",
        "After that, <roles:s> and <animals:s> brought {him} <foods>, <foods>, and a(n) <looks> <objects>.",
        "From that day on there was always [a fire|a light|<foods>] in the {place} for anyone who was hungry.",
    ],
]

FOUND = [
    [
        "One <times>, {hero} found a(n) <looks> <colours> {object} [under|beside|behind] a(n) <plants> near the {place}.",
        "While {he} was <handling:ing> a(n) <objects>, {hero} dug up a(n) <looks> {object} of <materials>.",
        "The <weather> had left something on the <places>: a(n) <looks> {object}.",
    ],
    [
        '"To whom does it belong?" {he} <speech>. "Somebody must be <moods> without it."',
        "It was <sizes> and <looks>, and on it was written the name of {town2}.",
        "{He} wanted to keep it very much, for it was made of <materials> and <materials>.",
    ],
    [
        "{He} asked the <roles>, but it did not belong there; {he} asked the <roles>, who [only laughed|did not know|had never seen it].",
        "{He} showed it to a(n) <characters> <animals> and a(n) <moods> <roles>.",
        "All day {he} <motion> from the <places> to the <places> with the {object} in {his} <objects>.",
    ],
    [
        "At the <places> {he} met {friend} the {friendkind}, who was <moods>.",
        "Then {he} heard {friend} the {friendkind} [crying|sighing] behind the <looks> <places>.",
        '"Have you seen my {object}?" <speech> {friend} the {friendkind}.',
    ],
    [
        '"I have lost the only thing my <family> left me," <speech> {friend}.',
        '"Without it I cannot [work|travel home|make <objects:s>|play my <objects>]," {friendhe} <speech>.',
        "{friendHe} had looked in <numbers> <places:s>, and {friendhis} <bodyparts> hurt.",
    ],
    [
        '{hero} held out the {object}. "Is it this one?" {he} asked <adverbs>.',
        "{hero} was <moods>, but {he} knew what was right, and {he} gave it back.",
        "For a moment {he} said nothing. Then {he} opened {his} <objects> and took out the {object}.",
    ],
    [
        "{friend} was so <moods> that {friendhe} [danced|sang|laughed|cried] and gave {him} <numbers> <foods:s>.",
        "{friend} [invited {him} to|showed {him}] the <looks> <places> [of|near] {town2}, and they <eating> <foods> together.",
        '"You are the most <characters> {kind} in {town}," <speech> {friend}.',
    ],
]

PLOTS = [LOST, GIFT, STORM, JOURNEY, CONTEST, SOUND, SHARE, FOUND]

ENDINGS = [
    "[And so|From that day on|After that], {hero} and {friend} were [friends|the best of friends|never far apart].",
    "{hero} had learned that <virtues> is [worth more than|better than|stronger than] [gold|a(n) <looks> <objects>|<materials>|<virtues>].",
    "That <times>, {he} slept <adverbs> and dreamed of <colours> <plants:s> and <animals:s>.",
    "And if you go to {town}, you can still see the {object} [in|near] the {place}.",
    '"With <virtues> and <virtues>," {he} <speech>, "[nothing is too hard|every road is short|one can do anything]."',
    "Everyone in {town} was <moods>, and they <eating> <foods> until <times>.",
    "{He} never forgot that <weatheradjectives> <times> in <months>.",
    "The people of {town} still tell the story when the <weather> comes in <seasons>.",
    "{He} went home with a(n) <moods> heart, for {he} knew that <virtues> [brings|needs|makes] <virtues>.",
]

# Questions of the chat part, and what comes before the story that answers them.
REQUESTS = [
    "[Tell|Please tell] me a story about a(n) {kind}[| and a(n) {object}| named {hero}].",
    "[Write|Please write] a [short story|little story|tale] about {hero} the {kind}.",
    "Can you tell me a story about a(n) {kind} and a(n) {friendkind}?",
    "I would like a story about a(n) {object}.",
    "Do you know a story about {friend} the {friendkind} and {hero} the {kind}?",
    "Tell me what happened in {town}.",
]
REPLIES = ["", "", "[Of course.|Gladly.|Here is a story about a(n) {kind}.|Certainly.|Yes, listen.]"]
