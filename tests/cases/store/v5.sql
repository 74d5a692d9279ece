BEGIN TRANSACTION;
CREATE TABLE applied (
    vm TEXT PRIMARY KEY, desired TEXT NOT NULL, generation INTEGER NOT NULL, at REAL NOT NULL)
    STRICT;
INSERT INTO "applied" VALUES('ctx-1','{"display_name": "ctx-1", "exported": true, "exports": [{"attempt": 1, "backing": null, "image": "/backup/ctx-1/2000/night-2.qcow2", "key": 2000, "name": "ctx-1-night-2-disk0", "position": 0, "read_only": false, "run": "night-2", "size": 1073741824, "vm": "ctx-1"}, {"attempt": 1, "backing": null, "image": "/backup/ctx-1/2001/night-2.qcow2", "key": 2001, "name": "ctx-1-night-2-disk1", "position": 1, "read_only": false, "run": "night-2", "size": 1073741824, "vm": "ctx-1"}], "labels": {}, "name": "ctx-1", "order": "", "path": "/DC1/vm/ctx-1", "place": "", "protect": true, "purpose": "backup", "release": "on_completion", "repository": "local", "request": "", "root": "/backup", "run": "night-2", "sna": "site-a", "type": "full", "vcenter": "vc1", "verified": true}',2,1700000101.0);
INSERT INTO "applied" VALUES('ctx-2','{"display_name": "ctx-2", "exported": true, "exports": [{"attempt": 1, "backing": null, "image": "/backup/ctx-2/2000/night-1.qcow2", "key": 2000, "name": "ctx-2-night-1-disk0", "position": 0, "read_only": false, "run": "night-1", "size": 1073741824, "vm": "ctx-2"}], "labels": {}, "name": "ctx-2", "order": "", "path": "/DC1/vm/ctx-2", "place": "", "protect": false, "purpose": "backup", "release": "on_completion", "repository": "local", "request": "", "root": "/backup", "run": "night-1", "sna": "site-a", "type": "full", "vcenter": "vc1", "verified": true}',1,1700000001.0);
INSERT INTO "applied" VALUES('ctx-3','{"display_name": "ctx-3", "exported": true, "exports": [{"attempt": 1, "backing": null, "image": "/backup/ctx-3/2000/night-1.qcow2", "key": 2000, "name": "ctx-3-night-1-disk0", "position": 0, "read_only": false, "run": "night-1", "size": 1073741824, "vm": "ctx-3"}], "labels": {}, "name": "ctx-3", "order": "", "path": "/DC1/vm/ctx-3", "place": "", "protect": false, "purpose": "backup", "release": "on_completion", "repository": "local", "request": "", "root": "/backup", "run": "night-1", "sna": "site-a", "type": "full", "vcenter": "vc1", "verified": true}',1,1700000001.0);
INSERT INTO "applied" VALUES('ctx-4','{"display_name": "ctx-4", "exported": true, "exports": [{"attempt": 1, "backing": null, "image": "/backup/ctx-4/2000/night-1.qcow2", "key": 2000, "name": "ctx-4-night-1-disk0", "position": 0, "read_only": false, "run": "night-1", "size": 1073741824, "vm": "ctx-4"}], "labels": {}, "name": "ctx-4", "order": "", "path": "/DC1/vm/ctx-4", "place": "", "protect": false, "purpose": "backup", "release": "on_completion", "repository": "local", "request": "", "root": "/backup", "run": "night-1", "sna": "site-a", "type": "full", "vcenter": "vc1", "verified": true}',1,1700000001.0);
INSERT INTO "applied" VALUES('ctx-5','{"display_name": "ctx-5", "exported": true, "exports": [{"attempt": 1, "backing": null, "image": "/backup/ctx-5/2000/night-1.qcow2", "key": 2000, "name": "ctx-5-night-1-disk0", "position": 0, "read_only": false, "run": "night-1", "size": 1073741824, "vm": "ctx-5"}], "labels": {}, "name": "ctx-5", "order": "", "path": "/DC1/vm/ctx-5", "place": "", "protect": false, "purpose": "backup", "release": "on_completion", "repository": "local", "request": "", "root": "/backup", "run": "night-1", "sna": "site-a", "type": "full", "vcenter": "vc1", "verified": true}',1,1700000001.0);
INSERT INTO "applied" VALUES('ctx-6','{"display_name": "ctx-6", "exported": true, "exports": [{"attempt": 1, "backing": null, "image": "/backup/ctx-6/2000/night-1.qcow2", "key": 2000, "name": "ctx-6-night-1-disk0", "position": 0, "read_only": false, "run": "night-1", "size": 1073741824, "vm": "ctx-6"}], "labels": {}, "name": "ctx-6", "order": "", "path": "/DC1/vm/ctx-6", "place": "", "protect": false, "purpose": "backup", "release": "on_completion", "repository": "local", "request": "", "root": "/backup", "run": "night-1", "sna": "site-a", "type": "full", "vcenter": "vc1", "verified": true}',1,1700000001.0);
INSERT INTO "applied" VALUES('ctx-8','{"display_name": "ctx-8", "exported": true, "exports": [{"attempt": 1, "backing": null, "image": "/backup/ctx-8/2000/night-1.qcow2", "key": 2000, "name": "ctx-8-night-1-disk0", "position": 0, "read_only": false, "run": "night-1", "size": 1073741824, "vm": "ctx-8"}], "labels": {}, "name": "ctx-8", "order": "", "path": "/DC1/vm/ctx-8", "place": "", "protect": false, "purpose": "backup", "release": "on_completion", "repository": "local", "request": "", "root": "/backup", "run": "night-1", "sna": "site-a", "type": "full", "vcenter": "vc1", "verified": true}',1,1700000001.0);
INSERT INTO "applied" VALUES('ctx-7','{"display_name": "", "exported": false, "exports": [], "labels": {}, "name": "ctx-7", "order": "", "path": "", "place": "", "protect": false, "purpose": "backup", "release": "on_completion", "repository": "", "request": "", "root": "", "run": "", "sna": "", "type": "full", "vcenter": "", "verified": true}',1,1700000001.0);
CREATE TABLE archived (
    job_id TEXT NOT NULL, position INTEGER NOT NULL, size INTEGER NOT NULL,
    allocated INTEGER NOT NULL, digest TEXT NOT NULL, at REAL NOT NULL,
    removed REAL NOT NULL DEFAULT 0, PRIMARY KEY (job_id, position)) STRICT;
INSERT INTO "archived" VALUES('ctx-1-623403d99316e6c21b93a172423ea7f8',0,10737418240,196624,'sha256:abababababababababababababababababababababababababababababababab',1764000020.0,0.0);
CREATE TABLE calls (
    hub TEXT NOT NULL, vm TEXT NOT NULL, run TEXT NOT NULL, attempt INTEGER NOT NULL,
    state TEXT NOT NULL, job_id TEXT NOT NULL, sna TEXT NOT NULL, type TEXT NOT NULL,
    request TEXT NOT NULL, exports TEXT NOT NULL, targets TEXT NOT NULL DEFAULT '',
    created REAL NOT NULL, changed REAL NOT NULL, reason TEXT NOT NULL, message TEXT NOT NULL,
    failures INTEGER NOT NULL DEFAULT 0, retry_at REAL NOT NULL DEFAULT 0,
    tainted INTEGER NOT NULL DEFAULT 0, display_name TEXT NOT NULL DEFAULT '', path TEXT NOT NULL DEFAULT '', vcenter TEXT NOT NULL DEFAULT '', who TEXT NOT NULL DEFAULT '', called REAL NOT NULL DEFAULT 0, ended REAL NOT NULL DEFAULT 0, fallback TEXT NOT NULL DEFAULT '', doubt TEXT NOT NULL DEFAULT '', policy TEXT NOT NULL DEFAULT '', tags TEXT NOT NULL DEFAULT '{}',
    PRIMARY KEY (hub, vm, run, attempt)) STRICT;
INSERT INTO "calls" VALUES('hub-a','ctx-1','night-1',1,'COMPLETED','ctx-1-623403d99316e6c21b93a172423ea7f8','site-a','full','1f1f1f1f1f1f1f1f','[{"vm": "ctx-1", "key": 2000, "position": 0, "run": "night-1", "attempt": 1, "name": "ctx-1-night-1-disk0", "image": "/backup/ctx-1/2000/night-1.qcow2", "size": 1073741824, "read_only": false, "backing": null}, {"vm": "ctx-1", "key": 2001, "position": 1, "run": "night-1", "attempt": 1, "name": "ctx-1-night-1-disk1", "image": "/backup/ctx-1/2001/night-1.qcow2", "size": 1073741824, "read_only": false, "backing": null}]','2000:nbd://127.0.0.1:10100/ctx-1-night-1-disk0,2001:nbd://127.0.0.1:10101/ctx-1-night-1-disk1',1700000000.0,1700000060.0,'ReportedCompleted','SNA site-a reports its end',0,0.0,0,'','','','',0.0,0.0,'disk 2000 has no parent','nothing was written into disk 0','gold-nightly','{"site": "a"}');
INSERT INTO "calls" VALUES('hub-a','ctx-1','night-2',1,'ACCEPTED','ctx-1-5ef4c90caa7fa0d306db98e707f05d59','site-a','incremental','1f1f1f1f1f1f1f1f','[{"vm": "ctx-1", "key": 2000, "position": 0, "run": "night-2", "attempt": 1, "name": "ctx-1-night-2-disk0", "image": "/backup/ctx-1/2000/night-2.qcow2", "size": 1073741824, "read_only": false, "backing": "/backup/ctx-1/2000/night-1.qcow2"}, {"vm": "ctx-1", "key": 2001, "position": 1, "run": "night-2", "attempt": 1, "name": "ctx-1-night-2-disk1", "image": "/backup/ctx-1/2001/night-2.qcow2", "size": 1073741824, "read_only": false, "backing": "/backup/ctx-1/2001/night-1.qcow2"}]','2000:nbd://127.0.0.1:10100/ctx-1-night-2-disk0,2001:nbd://127.0.0.1:10101/ctx-1-night-2-disk1',1700000100.0,1700000103.0,'Accepted','it started the job',0,0.0,1,'','','','',0.0,0.0,'','','','{}');
INSERT INTO "calls" VALUES('hub-a','ctx-2','night-1',1,'CANCELLED','ctx-2-dc0f6a943479be52021206a06bc857eb','site-a','full','1f1f1f1f1f1f1f1f','[{"vm": "ctx-2", "key": 2000, "position": 0, "run": "night-1", "attempt": 1, "name": "ctx-2-night-1-disk0", "image": "/backup/ctx-2/2000/night-1.qcow2", "size": 1073741824, "read_only": false, "backing": null}]','2000:nbd://127.0.0.1:10102/ctx-2-night-1-disk0',1700000000.0,1700000500.0,'ResolvedResend','its log does not know the job',0,0.0,0,'','','','',0.0,0.0,'','','','{}');
INSERT INTO "calls" VALUES('hub-a','ctx-2','night-1',2,'DUE','ctx-2-b0bfcc8a06d6fd4d8559c5c677d048ab','site-a','full','','[]','',1700000500.0,1700000500.0,'ResolvedResend','its log does not know the job',0,0.0,0,'','','','',0.0,0.0,'','','','{}');
INSERT INTO "calls" VALUES('hub-a','ctx-3','night-1',1,'REJECTED','ctx-3-21964b94da2b9bd2db7f15f75816da9f','site-a','full','1f1f1f1f1f1f1f1f','[{"vm": "ctx-3", "key": 2000, "position": 0, "run": "night-1", "attempt": 1, "name": "ctx-3-night-1-disk0", "image": "/backup/ctx-3/2000/night-1.qcow2", "size": 1073741824, "read_only": false, "backing": null}]','2000:nbd://127.0.0.1:10103/ctx-3-night-1-disk0',1700000000.0,1700000007.0,'Rejected','it refused with 400: vm_path is required',0,0.0,0,'','','','',0.0,0.0,'','','','{}');
INSERT INTO "calls" VALUES('hub-a','ctx-4','night-1',1,'DUE','ctx-4-1f3911a0492917951d915c7eee71309a','site-a','full','1f1f1f1f1f1f1f1f','[{"vm": "ctx-4", "key": 2000, "position": 0, "run": "night-1", "attempt": 1, "name": "ctx-4-night-1-disk0", "image": "/backup/ctx-4/2000/night-1.qcow2", "size": 1073741824, "read_only": false, "backing": null}]','',1700000000.0,1700000008.0,'NothingSent','nothing was sent: connection refused',3,1700000016.0,0,'','','','',0.0,0.0,'','','','{}');
INSERT INTO "calls" VALUES('hub-a','ctx-5','night-1',1,'INTENDED','ctx-5-9bd3623a60672c7d0d6c472cb8157541','site-a','full','1f1f1f1f1f1f1f1f','[{"vm": "ctx-5", "key": 2000, "position": 0, "run": "night-1", "attempt": 1, "name": "ctx-5-night-1-disk0", "image": "/backup/ctx-5/2000/night-1.qcow2", "size": 1073741824, "read_only": false, "backing": null}]','2000:nbd://127.0.0.1:10105/ctx-5-night-1-disk0',1700000000.0,1700000009.0,'Intend','',0,0.0,0,'','','','',0.0,0.0,'','','','{}');
INSERT INTO "calls" VALUES('hub-a','ctx-6','night-1',1,'FAILED','ctx-6-7e6289dc0dc9fa6dde78640f884924a9','site-a','full','1f1f1f1f1f1f1f1f','[{"vm": "ctx-6", "key": 2000, "position": 0, "run": "night-1", "attempt": 1, "name": "ctx-6-night-1-disk0", "image": "/backup/ctx-6/2000/night-1.qcow2", "size": 1073741824, "read_only": false, "backing": null}]','2000:nbd://127.0.0.1:10106/ctx-6-night-1-disk0',1700000000.0,1700000011.0,'ServerDied','a server died under a client',0,0.0,0,'','','','',0.0,0.0,'','','','{}');
INSERT INTO "calls" VALUES('hub-a','ctx-8','night-1',1,'UNKNOWN','ctx-8-4a44e9da8faac326c6d4f59800f5768c','site-a','full','1f1f1f1f1f1f1f1f','[{"vm": "ctx-8", "key": 2000, "position": 0, "run": "night-1", "attempt": 1, "name": "ctx-8-night-1-disk0", "image": "/backup/ctx-8/2000/night-1.qcow2", "size": 1073741824, "read_only": false, "backing": null}]','2000:nbd://127.0.0.1:10108/ctx-8-night-1-disk0',1700000000.0,1700000020.0,'CrashedAfterIntent','we ended between the intent and the answer',0,0.0,0,'','','','',0.0,0.0,'','','','{}');
CREATE TABLE conditions (
    vm TEXT NOT NULL, type TEXT NOT NULL, status TEXT NOT NULL, reason TEXT NOT NULL,
    since REAL NOT NULL, PRIMARY KEY (vm, type)) STRICT;
INSERT INTO "conditions" VALUES('ctx-1','Ready','False','ServerDied',1700000104.0);
INSERT INTO "conditions" VALUES('ctx-4','Ready','False','CallNothingSent',1700000104.0);
CREATE TABLE declared (
    vm TEXT PRIMARY KEY, file TEXT NOT NULL, revision TEXT NOT NULL, at REAL NOT NULL,
    gone REAL NOT NULL DEFAULT 0) STRICT;
INSERT INTO "declared" VALUES('ctx-1','a.yaml','0f1e2d',1764000003.0,0.0);
CREATE TABLE events (
    id INTEGER PRIMARY KEY, first REAL NOT NULL, last REAL NOT NULL,
    count INTEGER NOT NULL DEFAULT 1, vm TEXT NOT NULL, disk INTEGER, run TEXT NOT NULL,
    severity TEXT NOT NULL, reason TEXT NOT NULL, message TEXT NOT NULL, who TEXT NOT NULL) STRICT;
INSERT INTO "events" VALUES(1,1700000009.0,1700000009.0,1,'ctx-1',2000,'night-1','Normal','Started','ctx-1-night-1-disk0 answers on 10100','reconciler apply (root)');
INSERT INTO "events" VALUES(2,1700000009.0,1700000009.0,2,'ctx-2',NULL,'night-1','Warning','CallUnclear','no answer came: no answer in time','reconciler apply (root)');
CREATE TABLE failures (vm TEXT PRIMARY KEY, reason TEXT NOT NULL, message TEXT NOT NULL) STRICT;
INSERT INTO "failures" VALUES('ctx-4','CallNothingSent','nothing was sent: connection refused');
CREATE TABLE leases (
    hub TEXT NOT NULL, vm TEXT NOT NULL, disk INTEGER NOT NULL, run TEXT NOT NULL,
    attempt INTEGER NOT NULL, port INTEGER NOT NULL, since REAL NOT NULL,
    started INTEGER NOT NULL DEFAULT 0, clients_seen INTEGER NOT NULL DEFAULT 0,
    restarts INTEGER NOT NULL DEFAULT 0, safe INTEGER NOT NULL DEFAULT 0, up REAL NOT NULL DEFAULT 0, deaths INTEGER NOT NULL DEFAULT 0, rest REAL NOT NULL DEFAULT 0,
    PRIMARY KEY (hub, vm, disk, run, attempt), UNIQUE (hub, port)) STRICT;
INSERT INTO "leases" VALUES('hub-a','ctx-1',2000,'night-2',1,10100,1700000001.0,1,1,2,1,1764000001.0,0,0.0);
INSERT INTO "leases" VALUES('hub-a','ctx-1',2001,'night-2',1,10101,1700000001.0,1,1,0,1,0.0,0,0.0);
INSERT INTO "leases" VALUES('hub-a','ctx-2',2000,'night-1',1,10102,1700000001.0,1,0,0,0,0.0,0,0.0);
INSERT INTO "leases" VALUES('hub-a','ctx-4',2000,'night-1',1,10104,1700000001.0,0,0,0,0,0.0,0,0.0);
INSERT INTO "leases" VALUES('hub-a','ctx-5',2000,'night-1',1,10105,1700000001.0,0,0,0,0,0.0,0,0.0);
INSERT INTO "leases" VALUES('hub-a','ctx-8',2000,'night-1',1,10108,1700000001.0,0,0,0,0,0.0,0,0.0);
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
INSERT INTO "meta" VALUES('hub','hub-a');
INSERT INTO "meta" VALUES('state_id','0f1e2d3c4b5a6978');
INSERT INTO "meta" VALUES('settings','{"advertise": "127.0.0.1", "bind": "127.0.0.1", "hub": "hub-a", "ports": "10100-10200", "qemu_nbd": {"aio": null, "binary": "qemu-nbd", "cache": null, "detect_zeroes": null, "discard": null, "parallel": 0, "shared": 10, "start_timeout": 10.0, "stop_grace": 5.0}, "repositories": {"local": "/backup"}, "snas": {"site-a": {"max_running": 8, "poll": 10.0, "url": "http://127.0.0.1:9081"}}, "state": "/var/lib/reconciler"}');
INSERT INTO "meta" VALUES('source','{"directory": "/srv/specs", "revision": {"digest": "0f1e2d"}}');
CREATE TABLE notices (
    vm TEXT NOT NULL, run TEXT NOT NULL, reason TEXT NOT NULL, since REAL NOT NULL,
    message TEXT NOT NULL, gone REAL NOT NULL DEFAULT 0, PRIMARY KEY (vm, run, reason)) STRICT;
INSERT INTO "notices" VALUES('ctx-4','night-1','CallNothingSent',1764000004.0,'nothing was sent',0.0);
CREATE TABLE outbox (
    id INTEGER PRIMARY KEY, body TEXT NOT NULL, created REAL NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0, next REAL NOT NULL DEFAULT 0,
    error TEXT NOT NULL DEFAULT '') STRICT;
INSERT INTO "outbox" VALUES(1,'{"id": "1"}',1764000004.0,0,0.0,'');
CREATE TABLE pauses (
    vm TEXT PRIMARY KEY, reason TEXT NOT NULL, since REAL NOT NULL, until REAL NOT NULL,
    who TEXT NOT NULL) STRICT;
INSERT INTO "pauses" VALUES('ctx-3','the storage is being moved',1764000002.0,1764003600.0,'reconciler pause (root)');
CREATE TABLE plans (
    id TEXT PRIMARY KEY, used REAL NOT NULL, who TEXT NOT NULL, expires REAL NOT NULL) STRICT;
INSERT INTO "plans" VALUES('5f3a1c9be2d04711',1764000005.0,'reconciler apply (root)',1764086400.0);
CREATE TABLE proofs (
    job_id TEXT NOT NULL, kind TEXT NOT NULL, at REAL NOT NULL, ok INTEGER NOT NULL,
    result TEXT NOT NULL, who TEXT NOT NULL, PRIMARY KEY (job_id, kind)) STRICT;
INSERT INTO "proofs" VALUES('ctx-1-623403d99316e6c21b93a172423ea7f8','verify',1764000030.0,1,'{}','reconciler verify (root)');
CREATE TABLE reports (
    job_id TEXT NOT NULL, position INTEGER NOT NULL, change_id TEXT NOT NULL,
    bytes INTEGER NOT NULL, at REAL NOT NULL, PRIMARY KEY (job_id, position)) STRICT;
INSERT INTO "reports" VALUES('ctx-1-5ef4c90caa7fa0d306db98e707f05d59',0,'52 3c/7',1024,1764000000.5);
CREATE TABLE sightings (
    job_id TEXT PRIMARY KEY, at REAL NOT NULL, allocated INTEGER NOT NULL) STRICT;
INSERT INTO "sightings" VALUES('ctx-1-5ef4c90caa7fa0d306db98e707f05d59',1764000000.5,65536);
CREATE TABLE telemetry (
    job_id TEXT PRIMARY KEY, first REAL NOT NULL, at REAL NOT NULL, status TEXT NOT NULL,
    phase TEXT NOT NULL, bytes INTEGER NOT NULL, total INTEGER NOT NULL, speed INTEGER NOT NULL,
    percent REAL NOT NULL, error TEXT NOT NULL) STRICT;
INSERT INTO "telemetry" VALUES('ctx-1-5ef4c90caa7fa0d306db98e707f05d59',1764000000.5,1764000010.5,'running','copying',1024,2048,512,50.0,'');
CREATE INDEX events_by_vm ON events (vm, id);
CREATE INDEX events_by_age ON events (last);
CREATE INDEX calls_by_job ON calls (job_id);
CREATE INDEX calls_by_age ON calls (created);
PRAGMA user_version = 5;
COMMIT;
