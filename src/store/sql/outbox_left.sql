-- How many messages wait for a relay, or for their time. Reads three tables: for somebody who asks by hand.
select (select count(*) from shardmq.outbox) + (select count(*) from shardmq.delayed)
       + (select coalesce(sum(b.count), 0) from shardmq.outbox_batch b)::bigint
