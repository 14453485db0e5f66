//! Programs that become others and make others while they are away.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::io::Write as _;
use std::time::Duration;

use common::{
    Lab, Program, Said, Shared, exists, migrate, parent_of, python, row, rows, signal, state,
    take_out, try_migrate, wait_until,
};
use conet_netsys::{IfName, Netlink};
use conet_testkit::Need;
use conet_testkit::random::Random;
use rustix::process::Signal;

const SOON: Duration = Duration::from_secs(10);

#[test]
fn a_program_becomes_another_away_and_may_move_again() {
    conet_testkit::privileged!(Need::Tun, Need::Program("python3"));
    let lab = Lab::up("wireguard");
    let first = "
import os, sys, time
print('first', flush=True)
while not os.path.exists(sys.argv[1]): time.sleep(0.01)
os.execv(sys.executable, [sys.executable, '-c', sys.argv[3], sys.argv[2], str(os.getpid())])";
    let second = "
import os, sys, time
print('second', str(os.getpid()) == sys.argv[2], flush=True)
while not os.path.exists(sys.argv[1]): time.sleep(0.01)
sys.exit(5)";
    let (python, go, end) = (python(), Shared::new("go"), Shared::new("end"));
    let mut program = lab.run(&[&python, "-c", first, go.path(), end.path(), second]);
    let (pid, said) = (program.pid(), Said::by(&mut program));
    said.wait_for("first");
    let remote = take_out(pid);
    go.create();
    said.wait_for("second");
    wait_until("being at home", SOON, || row(pid)["place"] == "home");
    wait_until("the remote half's end", SOON, || !exists(remote));
    let home = row(pid);
    assert_eq!((&home["hops_done"], &home["sent_home"]), (&2.into(), &0.into()), "{home}");
    assert_eq!(home["reason"]["code"], "execve", "{home}");
    take_out(pid);
    assert!(row(pid)["reason"].is_null());
    migrate(pid, "home");
    take_out(pid);
    end.create();
    assert_eq!(program.status_within(SOON).code(), Some(5));
    assert_eq!(said.text(), "first\nsecond True\n");
}

/// Prints its name and its parent's until it may end. Each line is one write, also where
/// Python is told not to buffer (PYTHONUNBUFFERED), as parent and child write at once.
const TALK: &str = "
import os, sys, time
go, end = sys.argv[1:3]
def say(*words): os.write(1, (' '.join(map(str, words)) + '\\n').encode())
say('up')
while not os.path.exists(go): time.sleep(0.01)
first = os.getpid()
pid = os.fork()
if pid == 0:
    for i in range(1000000):
        if os.path.exists(end): os._exit(7)
        say('child', os.getpid(), os.getppid() == first); time.sleep(0.02)
say('made', pid)
got, status = os.waitpid(pid, 0)
say('waited', got == pid, status)
sys.exit(5)";

/// Starts [`TALK`], moves it, and has it make its child: program, pids, what it says.
fn talking(lab: &Lab, go: &Shared, end: &Shared) -> (Program, u32, u32, Said) {
    let mut program = lab.run(&[&python(), "-c", TALK, go.path(), end.path()]);
    let (pid, said) = (program.pid(), Said::by(&mut program));
    said.wait_for("up");
    take_out(pid);
    go.create();
    let mut child = None;
    wait_until("its child", SOON, || {
        let text = said.text();
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        child = whole.lines().find_map(|line| line.strip_prefix("made ")?.parse().ok());
        child.is_some()
    });
    (program, pid, child.unwrap(), said)
}

#[test]
fn a_child_that_is_made_away_is_a_process_like_its_parent() {
    conet_testkit::privileged!(Need::Tun, Need::Program("python3"));
    let lab = Lab::up("wireguard");
    let (go, end) = (Shared::new("go"), Shared::new("end"));
    let (mut program, pid, child, said) = talking(&lab, &go, &end);
    wait_until("its remote pid", SOON, || row(child)["remote_pid"].is_u64());
    let (ours, theirs) = (row(pid), row(child));
    assert_eq!((&theirs["place"], &theirs["node"]), (&"away".into(), &"conet-h2".into()));
    assert_eq!(ours["place"], "away", "{ours}");
    let remote = u32::try_from(theirs["remote_pid"].as_u64().unwrap()).unwrap();
    assert!(exists(remote) && ours["remote_pid"] != theirs["remote_pid"]);
    assert_eq!(parent_of(child), Some(pid));
    // Each comes and goes by itself.
    migrate(child, "home");
    assert_eq!(
        (row(child)["place"].clone(), row(pid)["place"].clone()),
        ("home".into(), "away".into())
    );
    wait_until("its remote half's end", SOON, || !exists(remote));
    said.wait_for_more();
    migrate(child, "conet-h2");
    migrate(pid, "home");
    said.wait_for_more();
    assert_eq!(
        (row(child)["place"].clone(), row(pid)["place"].clone()),
        ("away".into(), "home".into())
    );
    // So does it stop and end.
    take_out(pid);
    signal(child, Signal::STOP);
    let remote = u32::try_from(row(child)["remote_pid"].as_u64().unwrap()).unwrap();
    wait_until("being stopped there", SOON, || state(remote) == Some('T'));
    signal(child, Signal::CONT);
    said.wait_for_more();
    end.create();
    assert_eq!(program.status_within(SOON).code(), Some(5));
    said.wait_for(&format!("waited True {}", 7 << 8));
    assert!(said.text().contains(&format!("child {child} True")));
    wait_until("the remote half's end", SOON, || !exists(remote));
}

#[test]
fn a_child_outlives_its_parent_and_both_daemons() {
    conet_testkit::privileged!(Need::Tun, Need::Program("python3"));
    let lab = Lab::up("wireguard");
    let (go, end) = (Shared::new("go"), Shared::new("end"));
    let (mut program, pid, child, said) = talking(&lab, &go, &end);
    wait_until("its remote pid", SOON, || row(child)["remote_pid"].is_u64());
    for host in ["conet-h2", "conet-h1"] {
        Lab::kill_daemon(host);
        said.wait_for_more();
        Lab::restart(host);
        wait_until("being found", SOON, || {
            row(child)["place"] == "away" && row(pid)["place"] == "away"
        });
        said.wait_for_more();
    }
    signal(pid, Signal::KILL);
    program.status_within(SOON);
    assert!(exists(child));
    said.wait_for(&format!("child {child} False"));
    let remote = row(child)["remote_pid"].clone();
    migrate(child, "home");
    said.wait_for_more();
    assert!(remote.is_u64());
    migrate(child, "conet-h2");
    said.wait_for_more();
    end.create();
    wait_until("the child's end", SOON, || !exists(child));
}

#[test]
fn a_child_whose_remote_half_is_killed_dies_alone() {
    conet_testkit::privileged!(Need::Tun, Need::Program("python3"));
    let lab = Lab::up("wireguard");
    let (go, end) = (Shared::new("go"), Shared::new("end"));
    let (mut program, pid, child, said) = talking(&lab, &go, &end);
    wait_until("its remote pid", SOON, || row(child)["remote_pid"].is_u64());
    signal(u32::try_from(row(child)["remote_pid"].as_u64().unwrap()).unwrap(), Signal::KILL);
    said.wait_for("waited True 9");
    assert_eq!(program.status_within(SOON).code(), Some(5));
    wait_until("the record's end", SOON, || row(child)["place"] == "ended");
    assert_eq!(row(child)["reason"]["code"], "remote-ended", "{}", row(child));
    wait_until("the parent's record", SOON, || row(pid)["place"] == "ended");
}

/// Makes a child for each number, which writes it to a file and ends by it.
const BIRTHS: &str = "
import os, sys
f = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
n = 0
print('begin', flush=True)
while not os.path.exists(sys.argv[1] + '.stop'):
    pid = os.fork()
    if pid == 0:
        os.write(f, b'%06d %d\\n' % (n, os.getpid()))
        os._exit(n % 200)
    os.write(f, b'%06d made\\n' % n)
    got, status = os.waitpid(pid, 0)
    assert got == pid and status == n % 200 << 8, (n, status)
    n += 1
print('made', n, flush=True)
sys.exit(9)
";

/// The second host's cable.
fn cut(is_cut: bool) {
    let bridge = (!is_cut).then(|| IfName::new("conet-lan").unwrap());
    Netlink::open().unwrap().set_master(IfName::new("conet-h2").unwrap(), bridge).unwrap();
}

#[test]
fn each_child_is_made_once_whatever_happens_to_daemons_and_lan() {
    conet_testkit::privileged!(Need::Tun, Need::Program("python3"));
    let seed = std::env::var("CONET_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    println!("CONET_SEED={seed}");
    let mut random = Random::new(seed);
    let lab = Lab::up("wireguard");
    let file = Shared::with("births", b"");
    let mut program = lab.run(&[&python(), "-c", BIRTHS, file.path()]);
    let (pid, said) = (program.pid(), Said::by(&mut program));
    said.wait_for("begin");
    let made = || std::fs::read(file.path()).unwrap().len();
    let (mut away, mut home) = (0, 0);
    for round in 0..12 {
        wait_until("being away", 3 * SOON, || {
            is_away(pid) || try_migrate(pid, "conet-h2").status.success()
        });
        // Children come and go; some are struck in the midst of it.
        std::thread::sleep(Duration::from_millis(100 + random.below(100)));
        match round % 4 {
            0 => {
                Lab::kill_daemon("conet-h2");
                std::thread::sleep(Duration::from_millis(random.below(300)));
                Lab::restart("conet-h2");
            }
            1 => {
                Lab::kill_daemon("conet-h1");
                std::thread::sleep(Duration::from_millis(random.below(300)));
                Lab::restart("conet-h1");
            }
            way => {
                cut(true);
                std::thread::sleep(Duration::from_millis(100 + (way - 2) * 1500));
                cut(false);
            }
        }
        let before = made();
        wait_until("more children", 3 * SOON, || made() > before);
        if is_away(pid) {
            away += 1;
        } else {
            home += 1;
        }
    }
    println!("{away} times away after a blow, {home} times home");
    let stop = format!("{}.stop", file.path());
    std::fs::write(&stop, b"").unwrap();
    let status = program.status_within(3 * SOON);
    std::fs::remove_file(&stop).unwrap();
    assert_eq!(status.code(), Some(9), "seed {seed}: {} {}", said.text(), row(pid));
    said.wait_for("made ");
    let count: usize = said.text().trim().rsplit(' ').next().unwrap().parse().unwrap();
    let text = std::fs::read_to_string(file.path()).unwrap();
    let mut lines: Vec<&str> = text.lines().map(|line| line.split(' ').next().unwrap()).collect();
    lines.sort_unstable();
    // Once by the parent and once by the child.
    let expected: Vec<String> =
        (0..count).flat_map(|n| [format!("{n:06}"), format!("{n:06}")]).collect();
    assert_eq!(lines, expected, "seed {seed}");
    println!("{count} children");
    nothing_is_hosted();
}

fn nothing_is_hosted() {
    wait_until("the end of all that was hosted", 3 * SOON, || {
        let hosted = Lab::exec("conet-h2", &["sh", "-c", "ls $(dirname $CONET_SOCKET)/hosted"]);
        let files = String::from_utf8_lossy(&hosted.stdout).into_owned();
        !files.contains("json") && !files.contains("sock")
    });
}

/// A pipeline of five programs and one of five of the shell's own, each of which waits
/// until the test has moved it; then a hundred commands: pipelines, substitutions,
/// background jobs, signals, and what `ps` shows of them.
const SCRIPT: &str = r#"
go=$1 text=$2
nap() { sleep 0.02; }
add() { while read -r x; do echo "$1$x"; done; }
seen() {
    sleep 60 & a=$!
    sh -c 'sleep 60; :' & b=$!
    until [ "$(ps -o comm= -s $$ | grep -c '^sleep$')" = 2 ]; do nap; done
    all=$(ps --forest -o comm= -s $$)
    pkill -P $b; kill $a; wait $a; wait $b
    echo "children:"; echo "$all"
}
echo begin
read -r x <"$go"
cat "$text" | tr a-y b-z | sed s/c/C/ | sort -r | cksum
echo "programs $?"
read -r x <"$go"
add 1 <"$text" | add 2 | add 3 | add 4 | add 5
echo "shells $?"
i=0
while [ $i -lt 100 ]; do
    i=$((i + 1))
    case $((i % 10)) in
    0) seq 1 2000 | sed s/1/x/ | tr x y | sort -r | cksum ;;
    1) echo "$(echo $i | tr 0-9 a-j) $(expr $i \* 3)" ;;
    2) (exit $((i % 7))); echo "status $?" ;;
    3) /bin/true; /bin/false; echo "false $?" ;;
    4) sleep 0.05 & wait $!; echo "waited $?" ;;
    5) sh -c 'kill -TERM $$' 2>/dev/null; echo "killed $?" ;;
    6) nosuchcommand$i 2>/dev/null; echo "none $?" ;;
    7) printf '%s\n' b a c | sort | { read x; echo "first $x"; } ;;
    8) cat <<END | wc -c
$i some text
END
    ;;
    9) seen 2>/dev/null ;;
    esac
    nap
done
echo $(sleep 0.1; echo inner) done
exit 9
"#;

/// A process and its descendants.
fn family(pid: u32) -> Vec<u32> {
    let mut found = vec![pid];
    let mut at = 0;
    while at < found.len() {
        let one = found[at];
        let children = std::fs::read_to_string(format!("/proc/{one}/task/{one}/children"));
        let children = children.unwrap_or_default();
        found.extend(children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        at += 1;
    }
    found
}

/// What `ps` shows of the session that `pid` leads.
fn forest(pid: u32) -> String {
    let session = pid.to_string();
    let shown = Lab::exec("conet-h1", &["ps", "--forest", "-o", "comm=", "-s", &session]);
    String::from_utf8(shown.stdout).unwrap()
}

/// A named pipe that all hosts see.
fn pipe(name: &str) -> Shared {
    let pipe = Shared::new(name);
    assert!(std::process::Command::new("mkfifo").arg(pipe.path()).status().unwrap().success());
    pipe
}

/// Writes to a named pipe, once somebody waits for it.
fn let_through(pipe: &Shared, text: &str) {
    use rustix::fs::{Mode, OFlags, open};
    let mut end = None;
    wait_until("somebody waiting at the pipe", SOON, || {
        end = open(pipe.path(), OFlags::WRONLY | OFlags::NONBLOCK, Mode::empty()).ok();
        end.is_some()
    });
    std::fs::File::from(end.unwrap()).write_all(text.as_bytes()).unwrap();
}

fn is_away(pid: u32) -> bool {
    row(pid)["place"] == "away"
}

/// A run of [`SCRIPT`].
#[derive(Debug, PartialEq)]
struct Ran {
    output: String,
    status: Option<i32>,
    /// At the two pipelines, while all wait.
    forests: [String; 2],
}

/// Runs the script in `shell`; with numbers, it and its children move.
fn script(lab: &Lab, shell: &str, mut random: Option<&mut Random>) -> Ran {
    let (go, text) = (pipe("go"), pipe("text"));
    let command = ["setsid", shell, "-c", SCRIPT, shell, go.path(), text.path()];
    let mut program = lab.run(&command);
    let (pid, said) = (program.pid(), Said::by(&mut program));
    let moves = random.is_some();
    said.wait_for("begin\n");
    let forests = ["programs 0\n", "shells 0\n"].map(|end| {
        let lines = "some\nlines\nof text\n";
        if moves {
            wait_until("the shell away", SOON, || {
                is_away(pid) || try_migrate(pid, "conet-h2").status.success()
            });
        }
        let_through(&go, "go\n");
        let is_programs = end.starts_with("programs");
        let mut all = Vec::new();
        wait_until("a pipeline of five", SOON, || {
            let names = forest(pid);
            all = family(pid);
            let own = names.lines().filter(|name| name.contains(shell)).count();
            all.len() == 6 && own == if is_programs { 1 } else { 6 }
        });
        if moves {
            for &one in &all {
                // The shell's own run where it runs; programs have begun at home.
                wait_until("each one away", SOON, || {
                    is_away(one) || is_programs && try_migrate(one, "conet-h2").status.success()
                });
            }
        }
        let forest = forest(pid);
        assert!(!moves || all.iter().all(|one| is_away(*one)), "{forest}");
        let_through(&text, lines);
        said.wait_for(end);
        forest
    });
    let (mut moved, mut of_children, mut tried) = (0, 0, 0);
    while !program.has_ended() {
        let Some(random) = random.as_mut() else {
            std::thread::sleep(Duration::from_millis(20));
            continue;
        };
        let all = family(pid);
        let one = all[usize::try_from(random.below(all.len() as u64)).unwrap()];
        let to = if is_away(one) && random.below(3) > 0 { "home" } else { "conet-h2" };
        tried += 1;
        if try_migrate(one, to).status.success() {
            moved += 1;
            of_children += u32::from(one != pid);
        }
        std::thread::sleep(Duration::from_millis(random.below(40)));
    }
    let status = program.status_within(SOON).code();
    println!("{shell}: {moved} moves of {tried}, {of_children} of children, status {status:?}");
    assert!(!moves || moved > 0, "{moved} of {tried}");
    if status == Some(9) {
        said.wait_for("inner done\n");
    } else {
        println!("{}", row(pid));
    }
    assert_eq!(forest(pid), "", "some of the session remain");
    Ran { output: said.text(), status, forests }
}

fn a_script_moves_and_so_do_its_children(shell: &str) {
    conet_testkit::privileged!(Need::Tun, Need::Program("ps"), Need::Program("setsid"));
    let seed = std::env::var("CONET_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed =
        seed.unwrap_or_else(|| u64::from(std::process::id()) << 20 | u64::from(shell == "bash"));
    println!("CONET_SEED={seed}");
    let lab = Lab::up("wireguard");
    let expected = script(&lab, shell, None);
    assert_eq!(expected.status, Some(9));
    assert_eq!(expected.forests[0].lines().count(), 6);
    let ran = script(&lab, shell, Some(&mut Random::new(seed)));
    assert_eq!(ran.output, expected.output, "seed {seed}");
    assert_eq!(ran, expected, "seed {seed}");
    nothing_is_hosted();
    assert!(rows().iter().all(|row| row["place"] == "ended"), "{:?}", rows());
}

#[test]
fn a_dash_script_moves_and_so_do_its_children() {
    a_script_moves_and_so_do_its_children("dash");
}

#[test]
fn a_bash_script_moves_and_so_do_its_children() {
    conet_testkit::privileged!(Need::Program("bash"));
    a_script_moves_and_so_do_its_children("bash");
}
