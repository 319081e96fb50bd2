use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tests::manifest::{PodObject, Service, node_object};
use tests::{Agent, Lab, Protocol, Topology};
#[test]
fn scratch() {
    let lab = Lab::new(Topology { nodes: 2, pods_per_node: 3, ..Topology::default() });
    let _servers: Vec<_> = lab.pods().map(|pod| lab.serve(pod, 8080)).collect();
    lab.manifests().write_list("nodes.json", lab.nodes.iter().map(node_object));
    lab.manifests().write(
        "web.json",
        Service::new("web").selector("app", "web").dual_stack(10).node_port("tcp", "TCP", 80, 8080, 30010),
    );
    for pod in lab.pods() {
        lab.manifests().write(&format!("pod-{}.json", pod.name), PodObject::of(pod).label("app", "web"));
    }
    let agents: Vec<Agent> = lab.nodes.iter().map(|n| Agent::start(&lab, n, &[])).collect();
    let to: SocketAddr = "10.96.0.10:80".parse().unwrap();
    let client = lab.client(lab.pod(1, 1)).with_timeout(Duration::from_secs(3));
    let start = Instant::now();
    let mut slow = 0;
    for i in 0..30000u32 {
        let port = 32768 + (i % 28000) as u16;
        let (took, result) = {
            let t = Instant::now();
            let r = client.connect_from(SocketAddr::new(lab.pod(1, 1).v4.into(), port), to);
            (t.elapsed(), r)
        };
        match result {
            Err(e) => {
                println!("{i} port {port}: connect {e} after {took:?}");
                if e.kind() == std::io::ErrorKind::AddrInUse {
                    continue;
                }
                let out = agents[0].cli(&["flows", "--output", "json"]);
                let v: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
                for r in v.as_array().unwrap() {
                    if r["client"].as_str().unwrap().ends_with(&format!(":{port}")) {
                        println!("{r}")
                    }
                }
                println!("{:?}", agents[0].cli_json(&["status"])["packets"]);
                println!("{}", lab.pod(1, 1).netns.exec("ss", &["-tan", "sport", "=", &format!(":{port}")]).unwrap());
                break;
            }
            Ok(mut s) => {
                if took > Duration::from_millis(500) {
                    slow += 1;
                    println!("{i} slow {took:?}");
                }
                tests::traffic::client::ask_on(&mut s)
                    .map(|_| ())
                    .unwrap_or_else(|e| println!("{i} port {port} ask: {e}"));
            }
        }
    }
    println!("{:?} slow {slow}", start.elapsed());
    println!("{:?}", agents[0].cli_json(&["status"])["packets"]);
}
