use std::sync::Mutex;

use clap::Parser;
use serde_json::json;
use tokio::sync::watch;

use super::*;
use crate::kube::fake::{Fake, pod};
use crate::output::Format;

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    logs: LogsArgs,
}

fn arguments(line: &str) -> LogsArgs {
    let words = std::iter::once("logs").chain(line.split_whitespace());
    Command::try_parse_from(words).unwrap().logs
}

const WEB: (&str, &str) = ("shop", "web-0");
const ORDERS: (&str, &str) = ("shop", "orders-7f-abc");

/// A record of a call that started at `second`.
fn call(second: &str, path: &str, more: &str) -> String {
    format!(
        "{{\"kind\":\"access\",\"time\":\"2026-11-24T07:00:{second}.000000Z\",\"direction\":\"inbound\",\
         \"source\":\"spiffe://m/ns/shop/sa/web\",\"destination\":\"spiffe://m/ns/shop/sa/orders\",\
         \"method\":\"GET\",\"path\":\"{path}\",\"status\":200{more}}}"
    )
}

fn denied(second: &str, id: &str) -> String {
    let more =
        format!(",\"decision\":\"deny\",\"reason\":\"no rule admits\",\"decision_id\":\"{id}\"");
    call(second, &format!("/{id}"), &more)
}

/// What a sidecar writes: a call that it served is one to itself.
fn say(fake: &Fake, pod: (&str, &str), second: &str, text: &str) {
    let account = pod.1.split('-').next().unwrap();
    let own = format!("\"destination\":\"spiffe://m/ns/{}/sa/{account}\"", pod.0);
    let text = if text.contains("inbound") {
        text.replace("\"destination\":\"spiffe://m/ns/shop/sa/orders\"", &own)
    } else {
        text.to_owned()
    };
    fake.say(pod, second, &text);
}

async fn shop() -> Fake {
    let fake = Fake::start().await;
    let mut orders = pod("shop", ORDERS.1, "orders");
    orders["metadata"]["labels"]["pod-template-hash"] = "7f".into();
    orders["metadata"]["ownerReferences"] = json!([{
        "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "backend-7f", "uid": "x", "controller": true,
    }]);
    fake.put("pods", orders);
    fake.put("pods", pod("shop", WEB.1, "web"));
    fake.put("pods", pod("jobs", "batch-1", "batch"));
    let mut plain = pod("shop", "plain", "plain");
    plain["metadata"]["annotations"] = json!({});
    fake.put("pods", plain);
    fake
}

/// The paths that are shown, and the notes.
async fn shown(fake: &Fake, line: &str) -> (Vec<String>, String) {
    let (mut out, mut notes) = (Vec::new(), Vec::new());
    let mut printer = Printer::new(&mut out, Format::Table, false);
    let asked = show(&arguments(line), fake.cluster(), &mut printer, &mut notes).await;
    let mut notes = String::from_utf8(notes).unwrap();
    if let Err(error) = asked {
        notes = format!("{notes}{error:#}");
    }
    (paths(&String::from_utf8(out).unwrap()), notes)
}

fn paths(table: &str) -> Vec<String> {
    let path = |line: &str| match line.split_once("GET ") {
        Some((_, rest)) => rest.split(' ').next().unwrap().to_owned(),
        None => line.to_owned(),
    };
    table.lines().skip(1).map(path).collect()
}

#[tokio::test]
async fn calls_of_all_sidecars_are_merged_in_the_order_of_their_starts() {
    let fake = shop().await;
    say(&fake, ORDERS, "05", &call("01", "/long", ""));
    say(&fake, ORDERS, "06", &call("04", "/4", ""));
    say(&fake, WEB, "02.5", &call("02", "/2", ""));
    say(&fake, WEB, "02.9", "panicked at the disco");
    say(&fake, ("jobs", "batch-1"), "03", &call("03", "/3", ""));
    let (paths, notes) = shown(&fake, "").await;
    let broken = "broken line shop/web-0:2: panicked at the disco";
    assert_eq!(paths, ["/long", "/2", broken, "/4"], "{notes}");
    let (paths, _) = shown(&fake, "-A").await;
    assert_eq!(paths, ["/long", "/2", broken, "/3", "/4"]);
    let (paths, _) = shown(&fake, "-n jobs").await;
    assert_eq!(paths, ["/3"]);
}

#[tokio::test]
async fn a_workload_is_meant_by_any_of_its_names() {
    let fake = shop().await;
    say(&fake, ORDERS, "01", &call("01", "/orders", ""));
    say(&fake, WEB, "02", &call("02", "/web", ""));
    for name in [
        "orders",
        "sa/orders",
        "backend",
        "deploy/backend",
        "rs/backend-7f",
        "pod/orders-7f-abc",
        "orders-7f-abc",
        "shop/orders",
        "shop/backend",
        "backend -A",
    ] {
        assert_eq!(shown(&fake, name).await.0, ["/orders"], "{name}");
    }
    for name in ["pod/orders", "deploy/orders", "jobs/orders", "sts/backend"] {
        let (paths, notes) = shown(&fake, name).await;
        assert!(paths.is_empty(), "{name}");
        assert!(notes.starts_with("no sidecar of `"), "{notes}");
    }
    let (_, notes) = shown(&fake, "shop/orders -n jobs").await;
    assert!(notes.contains("and --namespace another"), "{notes}");
}

#[tokio::test]
async fn each_call_is_shown_once_though_one_side_may_not_be_looked_at() {
    let fake = shop().await;
    let out = |second, path, more| call(second, path, more).replace("inbound", "outbound");
    say(&fake, WEB, "01", &out("01", "/seen-by-orders", ""));
    let elsewhere = out("02", "/elsewhere", "").replace("shop/sa/orders", "jobs/sa/x");
    say(&fake, WEB, "02", &elsewhere);
    let external = "\"destination\":\"spiffe://m/ns/shop/sa/orders\",";
    say(
        &fake,
        WEB,
        "03",
        &out("03", "/external", "").replace(external, ""),
    );
    assert_eq!(shown(&fake, "").await.0, ["/elsewhere", "/external"]);
    assert_eq!(shown(&fake, "-A").await.0, ["/external"]);
    assert_eq!(
        shown(&fake, "web").await.0.len(),
        3,
        "all that one workload wrote"
    );
}

#[tokio::test]
async fn no_pod_puts_words_into_the_mouth_of_another() {
    let fake = shop().await;
    fake.say(WEB, "01", &call("01", "/not-my-identity", ""));
    fake.page(WEB, "/denials", json!([]));
    let forged: Value = serde_json::from_str(&denied("02", "forged")).unwrap();
    fake.page(WEB, "/denials", json!([forged]));
    fake.page(ORDERS, "/denials", json!([]));
    for line in ["", "--denied", "--status 404"] {
        let (shown, _) = shown(&fake, line).await;
        assert!(!shown.is_empty(), "{line}");
        let broken = |line: &String| {
            line.starts_with("broken line shop/web-0:1: {") || line.contains("forged")
        };
        assert!(shown.iter().all(broken), "{shown:?}");
    }
}

#[tokio::test]
async fn what_a_sidecar_wrote_before_it_started_again_is_shown_too() {
    let fake = shop().await;
    let mut web = pod("shop", WEB.1, "web");
    web["status"]["initContainerStatuses"][0]["restartCount"] = 1.into();
    fake.put("pods", web);
    say(&fake, WEB, "01", &call("01", "/before", ""));
    fake.end(WEB, true);
    say(&fake, WEB, "02", &call("02", "/after", ""));
    assert_eq!(shown(&fake, "").await.0, ["/before", "/after"]);
}

#[tokio::test]
async fn since_is_asked_of_the_cluster_and_counted_from_a_calls_start() {
    let fake = shop().await;
    say(&fake, WEB, "01", &call("01", "/old", ""));
    let now = timestamp(OffsetDateTime::now_utc().into());
    let new = call("00", "/new", "").replace("2026-11-24T07:00:00.000000Z", &now);
    say(&fake, WEB, "02", &new);
    assert_eq!(shown(&fake, "--since 10m").await.0, ["/new"]);
    assert!(
        !fake.requests("sinceSeconds=605").is_empty(),
        "{:?}",
        fake.requests("log?")
    );
}

#[tokio::test]
async fn refusals_that_sidecars_remember_are_shown_once() {
    let fake = shop().await;
    say(&fake, ORDERS, "05", &denied("05", "in-both"));
    say(&fake, ORDERS, "06", &call("06", "/allowed", ""));
    let ring = [denied("01", "rotated-away"), denied("05", "in-both")];
    let ring: Vec<Value> = ring
        .iter()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    fake.page(ORDERS, "/denials", json!(ring));
    fake.page(WEB, "/denials", json!([]));
    let (paths, notes) = shown(&fake, "--denied").await;
    assert_eq!(paths, ["/rotated-away", "/in-both"], "{notes}");
    assert_eq!(notes, "");
    assert_eq!(shown(&fake, "--denied --path /in-*").await.0, ["/in-both"]);
    let (paths, _) = shown(&fake, "").await;
    assert_eq!(paths, ["/in-both", "/allowed"], "only with --denied");
    assert_eq!(fake.requests("portforward").len(), 4);
}

#[tokio::test]
async fn a_sidecar_that_does_not_answer_hides_no_other() {
    let fake = shop().await;
    say(&fake, ORDERS, "05", &denied("05", "logged"));
    fake.page(WEB, "/denials", json!([]));
    let (paths, notes) = shown(&fake, "--denied").await;
    assert_eq!(paths, ["/logged"]);
    assert!(
        notes.contains("asking the sidecar of shop/orders-7f-abc"),
        "{notes}"
    );
    assert!(notes.contains("connection refused"), "{notes}");
}

#[tokio::test]
async fn what_is_forbidden_is_said_with_what_to_do() {
    let fake = shop().await;
    say(&fake, ORDERS, "01", &call("01", "/1", ""));
    fake.forbid("/log?");
    let (_, notes) = shown(&fake, "").await;
    assert!(
        notes.starts_with("reading logs: forbidden: user \"u\" cannot get"),
        "{notes}"
    );
    assert!(notes.contains("kubectl auth can-i"), "{notes}");
    fake.forbid("/pods");
    let (_, notes) = shown(&fake, "-f").await;
    assert!(notes.starts_with("listing pods: forbidden"), "{notes}");
}

/// Takes what is printed, and tells whoever waits for it.
#[derive(Clone)]
struct Screen(Arc<Mutex<Vec<u8>>>, watch::Sender<()>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        self.1.send_replace(());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Screen {
    fn new() -> Self {
        Self(Arc::default(), watch::Sender::new(()))
    }

    fn paths(&self) -> Vec<String> {
        paths(&String::from_utf8(self.0.lock().unwrap().clone()).unwrap())
    }

    async fn shows(&self, path: &str) {
        let mut changed = self.1.subscribe();
        let waited = tokio::time::timeout(Duration::from_secs(30), async {
            while !self.paths().iter().any(|shown| shown == path) {
                changed.changed().await.unwrap();
            }
        });
        assert!(waited.await.is_ok(), "{path} in {:?}", self.paths());
    }
}

/// Follows while `script` runs; what was shown at its end.
async fn followed(fake: &Fake, line: &str, script: impl AsyncFnOnce(&Screen)) -> Vec<String> {
    let screen = Screen::new();
    let mut printer = Printer::new(screen.clone(), Format::Table, false);
    let (arguments, mut notes) = (arguments(line), Vec::new());
    tokio::select! {
        ended = show(&arguments, fake.cluster(), &mut printer, &mut notes) => {
            panic!("it ended: {ended:?}")
        }
        () = script(&screen) => {}
    }
    screen.paths()
}

#[tokio::test]
async fn following_sees_new_pods_restarts_and_ends() {
    let fake = shop().await;
    say(&fake, WEB, "01", &call("01", "/history", ""));
    let shown = followed(&fake, "-f", async |screen| {
        screen.shows("/history").await;
        say(&fake, WEB, "02", &call("02", "/live", ""));
        screen.shows("/live").await;
        let mut new = pod("shop", "web-1", "web");
        new["status"]["initContainerStatuses"][0]["state"] = json!({ "waiting": {} });
        fake.put("pods", new);
        say(&fake, ("shop", "web-1"), "03", &call("03", "/new-pod", ""));
        fake.put("pods", pod("shop", "web-1", "web"));
        screen.shows("/new-pod").await;
        fake.end(("shop", "web-1"), false);
        fake.remove("pods", "shop", "web-1");
        say(&fake, WEB, "04", &call("04", "/last-words", ""));
        fake.end(WEB, true);
        let mut again = pod("shop", WEB.1, "web");
        again["status"]["initContainerStatuses"][0]["restartCount"] = 1.into();
        fake.put("pods", again);
        say(&fake, WEB, "05", &call("05", "/after-restart", ""));
        screen.shows("/after-restart").await;
    });
    let expected = [
        "/history",
        "/live",
        "/new-pod",
        "/last-words",
        "/after-restart",
    ];
    assert_eq!(shown.await, expected);
}

#[tokio::test]
async fn a_stream_that_breaks_off_is_taken_up_without_doubles_and_gaps() {
    let fake = shop().await;
    say(&fake, WEB, "01.1", &call("01", "/1", ""));
    let shown = followed(&fake, "-f", async |screen| {
        screen.shows("/1").await;
        say(&fake, WEB, "01.2", &call("02", "/2", ""));
        screen.shows("/2").await;
        fake.cut();
        say(&fake, WEB, "01.3", &call("03", "/3", ""));
        screen.shows("/3").await;
        fake.cut();
        say(&fake, WEB, "01.4", &call("04", "/4", ""));
        screen.shows("/4").await;
    });
    assert_eq!(shown.await, ["/1", "/2", "/3", "/4"]);
}

#[tokio::test]
async fn lines_that_come_within_the_window_are_shown_in_the_order_of_their_starts() {
    let fake = shop().await;
    say(&fake, WEB, "01", &call("01", "/1", ""));
    say(&fake, ORDERS, "01", &call("00", "/0", ""));
    let shown = followed(&fake, "-f", async |screen| {
        screen.shows("/1").await;
        fake.asked("orders-7f-abc/log?&container=sidegate-proxy&follow=true")
            .await;
        fake.asked("web-0/log?&container=sidegate-proxy&follow=true")
            .await;
        say(&fake, WEB, "04", &call("04", "/4", ""));
        say(&fake, ORDERS, "05", &call("03", "/3", ""));
        say(&fake, WEB, "06", &call("02", "/2", ""));
        screen.shows("/4").await;
    });
    assert_eq!(shown.await, ["/0", "/1", "/2", "/3", "/4"]);
}

#[tokio::test]
async fn a_refusal_shown_from_memory_is_not_shown_again_when_its_line_comes() {
    let fake = shop().await;
    fake.page(WEB, "/denials", json!([]));
    let late: Value = serde_json::from_str(&denied("01", "late")).unwrap();
    fake.page(ORDERS, "/denials", json!([late]));
    let shown = followed(&fake, "-f --denied", async |screen| {
        screen.shows("/late").await;
        say(&fake, ORDERS, "01", &denied("01", "late"));
        say(&fake, ORDERS, "02", &denied("02", "next"));
        screen.shows("/next").await;
    });
    assert_eq!(shown.await, ["/late", "/next"]);
}

#[tokio::test]
async fn a_namespace_without_sidecars_can_be_followed() {
    let fake = Fake::start().await;
    let (_, notes) = shown(&fake, "").await;
    assert!(
        notes.contains("labelled `sidegate.dev/inject: enabled`"),
        "{notes}"
    );
    let shown = followed(&fake, "-f", async |screen| {
        fake.asked("watch=true").await;
        say(&fake, WEB, "01", &call("01", "/first", ""));
        fake.put("pods", pod("shop", WEB.1, "web"));
        screen.shows("/first").await;
    });
    assert_eq!(shown.await, ["/first"]);
}

fn raw(text: &str) -> Raw {
    Raw {
        file: "shop/web-0".into(),
        number: 1,
        text: text.to_owned(),
    }
}

#[test]
fn of_more_than_fits_the_newest_are_held() {
    let mut held = Held::default();
    for time in ["3", "1", "4", "2"] {
        held.push(
            time.to_owned(),
            (raw(time), "shop/web".into()),
            2 * size(&raw("1")),
        );
    }
    let times: Vec<_> = held.lines.keys().map(|(time, _)| time.as_str()).collect();
    assert_eq!((times.as_slice(), held.lost), (&["3", "4"][..], 2));
}

#[test]
fn what_waits_is_bounded_in_time_and_number() {
    let filter = Filter::each_call_once();
    let entry = |second: &str| filter.entry(raw(&call(second, "/", ""))).unwrap();
    let start = Instant::now();
    let mut waiting = Waiting::default();
    waiting.push(entry("02"), start);
    waiting.push(entry("01"), start + WINDOW / 2);
    waiting.push(entry("03"), start + WINDOW / 2);
    assert!(waiting.take_due(start + WINDOW / 2).is_empty());
    let times = |entries: Vec<Entry>| {
        entries
            .iter()
            .map(|entry| entry.time()[17..19].to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        times(waiting.take_due(start + WINDOW)),
        ["01", "02"],
        "what is before it, too"
    );
    assert_eq!(times(waiting.take_all()), ["03"]);
    for _ in 0..=WAITING_MAX {
        waiting.push(entry("04"), start);
    }
    let taken = waiting.take_due(start).len();
    assert!((WAITING_MAX / 2..WAITING_MAX).contains(&taken), "{taken}");
}
